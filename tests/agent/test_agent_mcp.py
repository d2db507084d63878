"""Tools of real MCP servers: what they offer, what they bring, and what happens when they die or hang."""

import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
from agent_scripts import call, calls

pytest.importorskip("mcp")

from internlm2.agent import Agent, Limits, McpServer, McpTools, ScriptedModel
from internlm2.agent.tool_type import ToolDefinitionError
from internlm2.agent.tools import mcp as room
from internlm2.agent.tools.mcp import McpError

SCRIPT = Path(__file__).with_name("mcp_server.py")
COMMAND = [sys.executable, str(SCRIPT), "stdio"]


@pytest.fixture(scope="module")
def server():
    with McpTools(McpServer("small", COMMAND, environment={"OWN": "1"}), seconds=60) as made:
        yield made


def one(tools, name, *, limits=None, **arguments):
    outcome = Agent(
        ScriptedModel([calls(call(name, **arguments)), "ok"]), tools.tools, limits=limits or Limits()
    ).run("?")
    return outcome.calls[0]


def test_tools_are_offered_with_a_prefix_and_sound_names(server):
    tools = {t.name: t for t in server.tools}
    assert set(tools) == {
        f"small_{name}"
        for name in ("add", "get_the_picture", "mixed", "refuse", "flood", "sleep", "die", "process")
    }
    assert tools["small_add"].description == "Add two numbers."
    assert tools["small_add"].parameters["properties"]["a"]["type"] == "integer"
    assert tools["small_add"].parameters["required"] == ["a"]


def test_results_come_as_text_and_pictures(server):
    assert one(server, "small_add", a=2, b=40).text == "42"
    drawn = one(server, "small_get_the_picture")
    assert drawn.status == "ok"
    assert drawn.pictures[0].media_type == "image/png"
    assert drawn.pictures[0].data.startswith(b"\x89PNG")
    assert one(server, "small_mixed").text == (
        "first\nfrom a resource\n[a picture that cannot be read]\n[content of type image, which cannot be shown]"
    )


def test_errors_of_the_server_are_told(server):
    refused = one(server, "small_refuse")
    assert (refused.status, "refuse" in refused.text) == ("error", True)
    assert one(server, "small_add", a="x").status == "error"


def test_a_flood_is_cut_and_cleaned(server):
    result = one(server, "small_flood", limits=Limits(result_chars=500))
    assert len(result.text) < 600
    assert result.text.startswith("beginx")
    assert "\x1b" not in result.text


def test_the_server_sees_little_of_the_environment(server, monkeypatch):
    monkeypatch.setenv("SECRET_KEY", "x")
    _, *names = one(server, "small_process").text.split("\n")
    assert "OWN" in names
    assert "SECRET_KEY" not in names


def test_a_dead_server_is_an_error_and_the_next_call_starts_it_anew(server):
    first = one(server, "small_process").text.split("\n")[0]
    died = one(server, "small_die")
    assert died.status == "error"
    assert died.text.startswith("small: ")
    assert "dying now" in died.text
    second = one(server, "small_process").text.split("\n")[0]
    assert first != second
    wait_until_gone(int(first))


def test_a_slow_call_is_given_up_and_others_go_on():
    with McpTools(McpServer("small", COMMAND), seconds=60) as server:
        started = time.monotonic()
        assert one(server, "small_sleep", seconds=30, limits=Limits(tool_seconds=0.5)).status == "timeout"
        assert time.monotonic() - started < 10
        server._seconds = 0.5
        late = one(server, "small_sleep", seconds=30)
        assert (late.status, late.text) == ("error", "small gave no result within 0.5 s.")


def test_a_server_that_ends_with_its_user_leaves_nothing_behind():
    with McpTools(McpServer("small", COMMAND), seconds=60) as server:
        number = int(one(server, "small_process").text.split("\n")[0])
        os.kill(number, 0)
    wait_until_gone(number)
    server.close()  # twice does no harm


def wait_until_gone(number: int) -> None:
    end = time.monotonic() + 15
    while True:
        try:
            os.kill(number, 0)
        except ProcessLookupError:
            return
        assert time.monotonic() < end, "the server's process is still there"
        time.sleep(0.05)


@pytest.mark.parametrize(
    ("code", "message"),
    [
        ("import sys; print('no luck', file=sys.stderr); sys.exit(3)", "It wrote: no luck"),
        ("print('hello'); print('{}')", "cannot be reached"),
    ],
)
def test_a_command_that_is_no_server_is_told(code, message):
    with pytest.raises(McpError, match=message):
        McpTools(McpServer("odd", [sys.executable, "-c", code]), seconds=20)


def test_a_server_that_says_nothing_is_given_up():
    with pytest.raises(McpError, match=r"mute did not answer within 1 s"):
        McpTools(McpServer("mute", [sys.executable, "-c", "import time; time.sleep(60)"]), seconds=1)


def test_a_command_that_is_not_there_is_told():
    with pytest.raises(McpError, match=r"none cannot be reached: .*No such file"):
        McpTools(McpServer("none", ["/no/such/program"]), seconds=20)


def test_a_server_over_http_is_used_and_its_death_is_told():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    running = subprocess.Popen(
        [sys.executable, str(SCRIPT), str(port)], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    try:
        end = time.monotonic() + 60
        while True:
            with socket.socket() as probe:
                if probe.connect_ex(("127.0.0.1", port)) == 0:
                    break
            assert time.monotonic() < end
            time.sleep(0.1)
        with McpTools(
            McpServer("web", url=f"http://127.0.0.1:{port}/mcp", headers={"X-Own": "1"}), seconds=10
        ) as server:
            assert one(server, "web_add", a=2).text == "3"
            assert one(server, "web_get_the_picture").pictures
            running.kill()
            running.wait()
            died = one(server, "web_add", a=2)
            assert died.status == "error"
            assert died.text.startswith("web")
    finally:
        running.kill()
        running.wait()
    with pytest.raises(McpError, match="web cannot be reached"):
        McpTools(McpServer("web", url=f"http://127.0.0.1:{port}/mcp"), seconds=10)


def test_two_servers_of_one_name_collide_openly(server):
    with pytest.raises(ToolDefinitionError, match="Two tools are named 'small_add'"):
        Agent(ScriptedModel([]), [*server.tools, *server.tools])


def test_too_many_tools_and_endless_schemas_are_refused(server, monkeypatch):
    offered = server._loop.run(server._list())
    monkeypatch.setattr(room, "MAX_TOOLS", 3)
    with pytest.raises(McpError, match="offers more than 3 tools"):
        server._loop.run(server._list())
    monkeypatch.setattr(room, "MAX_SCHEMA_CHARS", 10)
    with pytest.raises(McpError, match="is longer than any model reads"):
        server._make(offered)


def test_words_of_a_server_are_cleaned_and_cut(server):
    (odd,) = server._make(
        [server._loop.run(server._list())[0].model_copy(update={"description": "\x1b[2Ja\x00" + "x" * 9999})]
    )
    assert odd.description.startswith("a\ufffdxxx")
    assert len(odd.description) < 5000


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("python my_server.py", McpServer("my_server", ["python", "my_server.py"])),
        ("notes=uvx 'a b' --x", McpServer("notes", ["uvx", "a b", "--x"])),
        ("http://localhost:8000/mcp", McpServer("localhost", url="http://localhost:8000/mcp")),
        ("web=https://h/mcp?k=1", McpServer("web", url="https://h/mcp?k=1")),
        ("npx -y @scope/server-x", McpServer("server-x", ["npx", "-y", "@scope/server-x"])),
    ],
)
def test_servers_are_named_on_the_command_line(text, expected):
    assert McpServer.parse(text) == expected


@pytest.mark.parametrize(
    ("text", "message"), [("", "needs a command"), (" ", "needs a command"), ("a 'b", "Close the quotes")]
)
def test_what_names_no_server_is_refused(text, message):
    with pytest.raises(ToolDefinitionError, match=message):
        McpServer.parse(text)
    with pytest.raises(ToolDefinitionError, match="one of both"):
        McpServer("x")
