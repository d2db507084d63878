"""InternEvo shards: both ways bit-exact, and against shards that the test cuts by hand, row by row."""

import numpy as np
import pytest
import torch
from small_models import assert_same_model, random_checkpoint, small_config

from goldens import golden, golden_folder
from internlm2.checkpoint.formats.internevo import InternEvoCheckpoint, write_internevo
from internlm2.checkpoint.load import load_checkpoint
from internlm2.checkpoint.open import open_checkpoint
from internlm2.checkpoint.source import check_complete
from internlm2.errors import CheckpointError, ConfigError, ExportError
from internlm2.model.config import RopeScaling

CONFIG = small_config(max_position_embeddings=32768, bos_token_id=1, eos_token_id=2, pad_token_id=2)


@pytest.mark.parametrize("adapt_hf", [True, False])
@pytest.mark.parametrize("pp", [1, 2, 3])
@pytest.mark.parametrize("tp", [1, 2])
def test_there_and_back_is_bit_exact(tp, pp, adapt_hf, tmp_path):
    original = random_checkpoint(CONFIG)
    write_internevo(original, tmp_path / "shards", tp=tp, pp=pp, adapt_hf=adapt_hf)
    assert len(list((tmp_path / "shards").glob("model_tp*_pp*.pt"))) == tp * pp
    found = open_checkpoint(tmp_path / "shards")
    assert isinstance(found, InternEvoCheckpoint)
    check_complete(found)
    assert_same_model(found, original)


def by_hand(
    folder, *, tp=2, pp=2, embed_split_hidden=True, prefix="", embedding="tok_embeddings", **settings
):
    """Shards made in numpy from InternEvo's description alone; returns the official tensors that they hold.

    Rotary pairs lie side by side in the shards (adapt_hf False). Layers count from 0 in every stage.
    """
    config, width, groups, slots = CONFIG, 8, 2, 5
    generator = np.random.default_rng(5)
    official: dict[str, np.ndarray] = {}
    stages = [[0, 1], [2]] if pp == 2 else [[0, 1, 2]]
    shards = [[{} for _ in range(pp)] for _ in range(tp)]

    def random(*shape):
        return generator.standard_normal(shape).astype(np.float32)

    def cut(array, dim, rank):
        size = array.shape[dim] // tp
        return torch.from_numpy(np.take(array, range(rank * size, (rank + 1) * size), axis=dim).copy())

    for stage, layers in enumerate(stages):
        for local, layer in enumerate(layers):
            stored = random(config.qkv_size, config.hidden_size)
            wanted = stored.copy()
            for group in range(groups):
                for slot in range(slots - 1):  # queries and the key; the value keeps its rows
                    first = (group * slots + slot) * width
                    for i in range(width // 2):
                        wanted[first + i] = stored[first + 2 * i]
                        wanted[first + width // 2 + i] = stored[first + 2 * i + 1]
            matrices = {
                "attention.wqkv": (stored, 0),
                "attention.wo": (random(48, 48), 1),
                "feed_forward.w1": (random(40, 48), 0),
                "feed_forward.w2": (random(48, 40), 1),
                "feed_forward.w3": (random(40, 48), 0),
            }
            for name, (array, dim) in matrices.items():
                official[f"model.layers.{layer}.{name}.weight"] = (
                    wanted if name == "attention.wqkv" else array
                )
                for rank in range(tp):
                    shards[rank][stage][f"{prefix}layers.{local}.{name}.weight"] = cut(array, dim, rank)
            for name in ("attention_norm", "ffn_norm"):
                official[f"model.layers.{layer}.{name}.weight"] = random(48)
                for rank in range(tp):
                    shards[rank][stage][f"{prefix}layers.{local}.{name}.weight"] = torch.from_numpy(
                        official[f"model.layers.{layer}.{name}.weight"]
                    )
                    shards[rank][stage][f"{prefix}layers.{local}.attention.rotary_emb.inv_freq"] = torch.ones(
                        4
                    )
    official["model.tok_embeddings.weight"] = random(90, 48)
    official["model.norm.weight"] = random(48)
    official["output.weight"] = random(90, 48)
    for rank in range(tp):
        rows = cut(official["model.tok_embeddings.weight"], 1 if embed_split_hidden else 0, rank)
        shards[rank][0][f"{prefix}{embedding}.weight"] = rows
        shards[rank][-1][f"{prefix}norm.weight"] = torch.from_numpy(official["model.norm.weight"])
        shards[rank][-1][f"{prefix}output.weight"] = cut(official["output.weight"], 0, rank)
        for stage in range(pp):
            torch.save(shards[rank][stage], folder / f"model_tp{rank}_pp{stage}.pt")
    described = {
        "num_layers": 3,
        "hidden_size": 48,
        "num_attention_heads": 6,
        "num_kv_attention_heads": 2,
        "vocab_size": 90,
        "layer_norm_epsilon": 1e-5,
        "rope_base": 1000000,
        "embed_split_hidden": embed_split_hidden,
        "no_bias": True,
        "mlp_ratio": 0.8,
        "dtype": torch.float32,
    }
    torch.save(described | settings, folder / "model_config.pt")
    return {name: torch.from_numpy(array) for name, array in official.items()}


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"tp": 1, "pp": 1},
        {"embed_split_hidden": False},
        {"prefix": "model.", "embedding": "tok_embeddings.word_embeddings"},
    ],
)
def test_shards_cut_by_hand_are_put_together(options, tmp_path):
    expected = by_hand(tmp_path, **options)
    found = InternEvoCheckpoint(tmp_path)
    assert found.config == CONFIG
    check_complete(found)
    for name, tensor in expected.items():
        assert torch.equal(found.read(name), tensor), name


def test_adapt_hf_leaves_the_rows_alone(tmp_path):
    expected = by_hand(tmp_path, tp=1, pp=1, adapt_hf=True)
    stored = torch.load(tmp_path / "model_tp0_pp0.pt", weights_only=True)["layers.1.attention.wqkv.weight"]
    assert torch.equal(InternEvoCheckpoint(tmp_path).read("model.layers.1.attention.wqkv.weight"), stored)
    assert not torch.equal(expected["model.layers.1.attention.wqkv.weight"], stored)


def test_norm_head_gives_rows_of_unit_length(tmp_path):
    expected = by_hand(tmp_path, norm_head=True)["output.weight"]
    found = InternEvoCheckpoint(tmp_path).read("output.weight")
    torch.testing.assert_close(found, expected / expected.norm(dim=-1, keepdim=True))
    torch.testing.assert_close(found.norm(dim=-1), torch.ones(90))


def test_a_wrong_flag_would_be_seen(tmp_path):
    """Negative control: paired rows read as halves miss the official logits by far."""
    source = open_checkpoint(golden_folder("gqa"))
    tensors = golden("gqa")
    ids, expected = tensors["forward.33.input_ids"], tensors["forward.33.logits"]
    write_internevo(source, tmp_path / "shards", tp=2, pp=2, adapt_hf=False)
    found = InternEvoCheckpoint(tmp_path / "shards", max_position_embeddings=256)
    with torch.no_grad():
        torch.testing.assert_close(load_checkpoint(found)(ids), expected, atol=1e-4, rtol=0)
        settings = torch.load(tmp_path / "shards" / "model_config.pt", weights_only=True)
        torch.save(settings | {"adapt_hf": True}, tmp_path / "shards" / "model_config.pt")
        wrong = load_checkpoint(InternEvoCheckpoint(tmp_path / "shards", max_position_embeddings=256))(ids)
    assert (wrong - expected).abs().max() > 0.1


def test_what_the_shards_do_not_say_can_be_given(tmp_path):
    by_hand(tmp_path, num_kv_attention_heads=2)
    scaling = RopeScaling("dynamic", 2.0)
    found = InternEvoCheckpoint(tmp_path, max_position_embeddings=4096, rope_scaling=scaling)
    assert (found.config.max_position_embeddings, found.config.rope_scaling) == (4096, scaling)


def test_absent_settings_are_those_of_the_official_converter(tmp_path):
    by_hand(tmp_path)
    settings = torch.load(tmp_path / "model_config.pt", weights_only=True)
    for key in ("rope_base", "no_bias"):
        del settings[key]
    torch.save(settings, tmp_path / "model_config.pt")
    assert InternEvoCheckpoint(tmp_path).config.rope_theta == 10000.0


@pytest.mark.parametrize("missing", ["model_tp1_pp0.pt", "model_tp0_pp1.pt", "model_tp0_pp0.pt"])
def test_a_missing_rank_is_named(missing, tmp_path):
    by_hand(tmp_path)
    (tmp_path / missing).unlink()
    with pytest.raises(CheckpointError, match=f"{missing} is missing"):
        InternEvoCheckpoint(tmp_path)


def test_no_shards_at_all(tmp_path):
    torch.save({}, tmp_path / "model_config.pt")
    with pytest.raises(CheckpointError, match=r"no model_tp0_pp0\.pt"):
        InternEvoCheckpoint(tmp_path)


def change_shard(folder, name, change):
    shard = torch.load(folder / name, weights_only=True)
    change(shard)
    torch.save(shard, folder / name)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda s: s.update({"layers.0.feed_forward.w1.weight": torch.ones(3, 48)}),
            r"w1.weight is \[20, 48\]",
        ),
        (lambda s: s.update({"layers.0.ffn_norm.weight": torch.ones(48).half()}), "float16 on rank 1"),
        (
            lambda s: s.pop("layers.0.attention.wo.weight"),
            "only tensor-parallel rank 0 holds layers.0.attention.wo",
        ),
        (lambda s: s.update({"extra": torch.ones(1)}), "only tensor-parallel rank 1 holds extra"),
    ],
)
def test_ranks_that_contradict_each_other_are_named(change, message, tmp_path):
    by_hand(tmp_path)
    change_shard(tmp_path, "model_tp1_pp0.pt", change)
    with pytest.raises(CheckpointError, match=message):
        InternEvoCheckpoint(tmp_path)


def test_norms_that_differ_between_ranks_are_found_on_reading(tmp_path):
    by_hand(tmp_path)
    change_shard(tmp_path, "model_tp1_pp0.pt", lambda s: s["layers.0.ffn_norm.weight"].add_(1.0))
    with pytest.raises(CheckpointError, match=r"layers\.0\.ffn_norm\.weight differs between"):
        InternEvoCheckpoint(tmp_path).read("model.layers.0.ffn_norm.weight")


def test_a_tensor_in_two_stages_is_refused(tmp_path):
    by_hand(tmp_path)
    for rank in range(2):
        change_shard(tmp_path, f"model_tp{rank}_pp0.pt", lambda s: s.update({"norm.weight": torch.ones(48)}))
    with pytest.raises(CheckpointError, match=r"norm\.weight is in two pipeline stages"):
        InternEvoCheckpoint(tmp_path)


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"no_bias": False}, CheckpointError, "no_bias is False"),
        ({"vocab_size": None}, CheckpointError, "vocab_size is None, but must be a whole number"),
        (
            {"layer_norm_epsilon": "small"},
            CheckpointError,
            "layer_norm_epsilon is 'small', but must be a number",
        ),
        ({"num_kv_attention_heads": 4}, ConfigError, "multiple of num_key_value_heads"),
    ],
)
def test_settings_that_cannot_be(settings, error, message, tmp_path):
    by_hand(tmp_path, **settings)
    with pytest.raises(error, match=message):
        InternEvoCheckpoint(tmp_path)


def test_settings_of_another_kind(tmp_path):
    by_hand(tmp_path)
    torch.save([1], tmp_path / "model_config.pt")
    with pytest.raises(CheckpointError, match="must hold a dict of settings"):
        InternEvoCheckpoint(tmp_path)


def test_shards_of_another_architecture(tmp_path):
    torch.save({"blocks.0.mixer.weight": torch.ones(2)}, tmp_path / "model_tp0_pp0.pt")
    torch.save({"num_layers": 1}, tmp_path / "model_config.pt")
    with pytest.raises(CheckpointError, match="so this is not InternLM2"):
        InternEvoCheckpoint(tmp_path)


def test_a_missing_layer_is_found_before_loading(tmp_path):
    by_hand(tmp_path, num_layers=4)
    with pytest.raises(CheckpointError, match=r"model\.layers\.3\.attention_norm|model\.layers\.3"):
        check_complete(InternEvoCheckpoint(tmp_path))


@pytest.mark.parametrize(
    ("changes", "options", "message"),
    [
        ({}, {"tp": 3}, "tp is 3, but must divide num_key_value_heads=2"),
        ({}, {"tp": 0}, "tp is 0"),
        ({}, {"pp": 4}, "pp is 4, but must be from 1 to num_hidden_layers=3"),
        ({"bias": True}, {}, "bias True"),
        ({"tie_word_embeddings": True}, {}, "tied embeddings True"),
        ({"head_dim": 10}, {}, "no head_dim of its own"),
        ({"head": "reward"}, {}, "reward model"),
    ],
)
def test_what_internevo_cannot_hold_is_refused(changes, options, message, tmp_path):
    checkpoint = random_checkpoint(small_config(**changes))
    with pytest.raises(ExportError, match=message):
        write_internevo(checkpoint, tmp_path / "out", **({"tp": 1, "pp": 1, "adapt_hf": True} | options))
    assert list(tmp_path.iterdir()) == []


def test_a_shard_holds_its_slice_and_not_the_whole_tensor(tmp_path):
    original = random_checkpoint(CONFIG)
    write_internevo(original, tmp_path / "shards", tp=2, pp=1, adapt_hf=True)
    whole = sum(info.num_bytes for info in original.tensors.values())
    assert (tmp_path / "shards" / "model_tp0_pp0.pt").stat().st_size < 0.7 * whole
