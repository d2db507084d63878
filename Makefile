# Two commands do everything: `make demo` talks to a small model, `make test` runs the tests.
PROMPT ?= Why is the sky blue? Answer in two sentences.

.PHONY: demo test test-slow lint bench clean

.venv/.ready: pyproject.toml constraints.txt scripts/setup.sh
	@sh scripts/setup.sh

demo: .venv/.ready
	@.venv/bin/internlm2 generate demo "$(PROMPT)" --chat --temperature 0 --max-tokens 200

test: .venv/.ready
	.venv/bin/pytest -n auto --maxprocesses 4

test-slow: .venv/.ready
	.venv/bin/pip install -q -c constraints.txt -e '.[dev,ray,gpu]'
	.venv/bin/pytest -m slow

lint: .venv/.ready
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .
	.venv/bin/pyrefly check
	.venv/bin/lint-imports

bench: .venv/.ready
	.venv/bin/python benchmarks/load_memory.py
	.venv/bin/python benchmarks/tokenizer.py
	.venv/bin/python benchmarks/decode.py
	.venv/bin/python benchmarks/threads.py
	.venv/bin/python benchmarks/engine.py
	.venv/bin/python benchmarks/speculative.py
	.venv/bin/python benchmarks/long_context.py

clean:
	rm -rf .venv build dist
