"""Every block of the README and the docs runs, or says above it why not; what is shown was printed;
links lead on."""

from __future__ import annotations

import ast
import re
import shlex
import subprocess
import sys
import time
import tomllib
import urllib.request
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import pytest
import typer

import packscore
from cli_helpers import Cli, with_command
from packscore import shipped_model_path
from packscore.cli.app import app
from processes import QUICK_PROGRAMS

ROOT = Path(__file__).resolve().parents[1]
PAGES = [*sorted(ROOT.glob("*.md")), *sorted((ROOT / "docs").glob("*.md"))]
# what cannot be downloaded while testing goes through the same code as the shipped model
HUB_NAME = "Qwen/Qwen3-Reranker-0.6B"
# Why a block is not run here, as its page says above it: "*Not run by the tests: REASON.*"
NOT_RUN = {
    "needs a TPU": "no machine of ours has one",
    "makes machines in your Google account": "they cost money",
    "installs into the system": "the tests' own environment stays as it is",
    "needs a container engine": "the tests' machine has none",
    "needs Ray": "tests/fleet/run.py has it in an environment of its own, and runs these",
    "takes minutes": "the suite has a quarter of an hour for everything",
}
MARK = r"^\*Not run by the tests: (.+)\.\*\n\n(?=```)"
# what runs a block's language: snippets, sessions and commands below; text is what these print
RUN, SHOWN = {"python", "console", "bash"}, {"text", "yaml", "json"}
# what only jax runs
OF_JAX = re.compile(r"[\"' ](jax|tpu)[\"'\n ]|packscore_kernels|run_notebook|host_work")
# text that a script prints, and not the page's own snippets
SCRIPTS = {
    "README.md": "examples/rerank.py",
    "docs/benchmarks.md": "benchmarks/host_work.py",
}


def fences(text: str) -> list[tuple[str, str, str | None]]:
    """(language, content, reason not to run it) of every block."""
    found = re.findall(rf"(?:{MARK})?^```(.*)\n((?:.*\n)*?)^```$", text, re.MULTILINE)
    return [(language, content, reason or None) for reason, language, content in found]


def blocks(page: Path, language: str) -> list[str]:
    """The content of the blocks of a language that are to run, or to be compared."""
    return [
        content
        for kind, content, reason in fences(page.read_text())
        if (kind, reason) == (language, None)
    ]


def with_blocks(language: str) -> list[Any]:
    """Pages that have some; those that need jax are marked so."""
    found = {page: "\n".join(blocks(page, language)) for page in PAGES}
    return [
        pytest.param(page, marks=[pytest.mark.jax] if OF_JAX.search(text) else [])
        for page, text in found.items()
        if text
    ]


def unknown(text: str) -> list[str]:
    """What of a page's blocks would neither run nor be named as not run."""
    found = [
        kind
        for kind, _, reason in fences(text)
        if kind not in RUN | SHOWN or (reason and kind not in RUN | {"text"})
    ]
    marks = re.findall(r"^\*Not run by the tests: ", text, re.MULTILINE)
    marked = [reason for _, _, reason in fences(text) if reason]
    if len(marks) != len(marked) or text.count("\n```") % 2:
        found.append("a mark or a fence without its block")
    return found + [reason for reason in marked if reason not in NOT_RUN]


def test_every_block_runs_or_says_why_not() -> None:
    for page in PAGES:
        assert unknown(page.read_text()) == [], page.name
    told = {reason for page in PAGES for _, _, reason in fences(page.read_text()) if reason}
    assert told == set(NOT_RUN)  # no reason outlives its last block


def test_a_block_that_nothing_runs_is_found() -> None:
    assert unknown("# Page\n\n```bash\npackscore doctor\n```\n") == []
    assert unknown("\n```sh\nfrobnicate\n```\n") == ["sh"]
    assert unknown("\n```\nfrobnicate\n```\n") == [""]
    mark = "*Not run by the tests: {}.*\n\n```bash\nfrobnicate\n```\n"
    assert unknown(mark.format("needs a TPU")) == []
    assert unknown(mark.format("it is late")) == ["it is late"]
    assert unknown(mark.format("needs a TPU").replace("\n\n", "\n\nText\n\n")) != []


def without_numbers(text: str) -> list[str]:
    """Words; scores, differences and times are other ones on other machines."""
    text = text.replace(str(shipped_model_path()), "MODEL")
    return re.sub(r"\b\d+\.\d+(e[+-]\d+)?\b|[\d,]+(?= (?:items|questions)/s)", "0.x", text).split()


@pytest.mark.usefixtures("quick_programs")
@pytest.mark.parametrize("page", with_blocks("python"), ids=lambda page: page.name)
def test_snippets_run_in_order(page: Path, capsys: pytest.CaptureFixture[str]) -> None:
    scope: dict[str, Any] = {}
    for code in blocks(page, "python"):
        local = code.replace(HUB_NAME, str(shipped_model_path()))
        exec(compile(local, str(page), "exec"), scope)
    if page.name == "README.md":
        ranked = scope["scorer"].rank("delete a directory tree", scope["documents"], top_k=2)
        assert ranked[0]["corpus_id"] == 1
        assert len(ranked) == 2
    printed = without_numbers(capsys.readouterr().out)
    texts = [] if str(page.relative_to(ROOT)) in SCRIPTS else blocks(page, "text")
    for shown in map(without_numbers, texts):
        assert any(printed[i : i + len(shown)] == shown for i in range(len(printed))), shown


@pytest.mark.parametrize(
    "page",
    [
        pytest.param(page, marks=[pytest.mark.jax] if OF_JAX.search(script) else [])
        for page, script in SCRIPTS.items()
    ],
)
def test_pages_show_what_scripts_print(page: str) -> None:
    command = [sys.executable, str(ROOT / SCRIPTS[page])]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    (shown,) = blocks(ROOT / page, "text")
    assert without_numbers(shown) == without_numbers(done.stdout)


def sessions(page: Path) -> Iterator[tuple[str, str]]:
    """(command, what is shown below it) of the console blocks, in order."""
    for block in blocks(page, "console"):
        for part in re.split(r"^\$ ", block, flags=re.MULTILINE)[1:]:
            here = re.match(r".*<<'(\w+)'\n(?:.*\n)*?\1\n", part)
            end = here.end() if here else part.index("\n") + 1
            yield part[:end], part[end:]


def wait_for(url: str) -> None:
    """Ask a server that is warming up until it is ready."""
    end = time.monotonic() + 120
    while True:
        try:
            urllib.request.urlopen(url).close()
            return
        except OSError:  # a status of 503 among them
            assert time.monotonic() < end, url
            time.sleep(0.2)


@contextmanager
def serving(command: str, environment: dict[str, str]) -> Iterator[tuple[str, str]]:
    """A server that a page leaves running: its port, a free one, and what it printed."""
    script = "exec " + command.rstrip("& \n").replace("--port 8000", "--port 0")
    server = subprocess.Popen(["bash", "-c", script], stderr=subprocess.PIPE, env=environment)
    assert server.stderr
    try:
        printed, found = "", None
        for line in map(bytes.decode, server.stderr):
            printed += line
            if found := re.search(r"http://127\.0\.0\.1:(\d+)", line):
                break
        assert found, printed
        wait_for(f"{found[0]}/ready")
        yield found[1], printed.replace(found[1], "8000")
    finally:
        server.terminate()
        assert server.wait(60) == 0
        server.stderr.close()


@pytest.mark.parametrize("page", with_blocks("console"), ids=lambda page: page.name)
def test_console_shows_what_commands_print(
    page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    code, environment, port = 0, with_command(tmp_path / "scripts"), "8000"
    with ExitStack() as servers:
        for command, shown in sessions(page):
            if command.startswith("packscore serve "):
                port, printed = servers.enter_context(serving(command, environment))
            elif command.startswith("packscore "):
                words = shlex.split(command.replace("$MODEL", environment["MODEL"]))
                done = Cli(tmp_path)(*words[1:])
                code, printed = done.code, done.err + done.out
            else:
                here = command.replace("localhost:8000", f"localhost:{port}")
                shell = ["bash", "-c", f"(exit {code}); {here}"]
                found = subprocess.run(
                    shell, capture_output=True, text=True, check=True, env=environment
                )
                printed = found.stdout
            assert without_numbers(printed) == without_numbers(shown), command


def steps(text: str) -> list[str]:
    """Commands joined by `&&` or newlines, without what changes nothing about them."""
    found = re.split(r"&&|\n", text)
    return [" ".join(re.sub(r"--quiet|\s-e\s", " ", step).split()) for step in found]


def refused(block: str) -> list[str]:
    """Steps of a block without `packscore` that neither .ci/run takes nor only name extras."""
    in_ci = steps((ROOT / ".ci/run").read_text())
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    found = []
    for step in filter(None, steps(block)):
        extras = re.fullmatch(r"pip install '\.\[(\S+)\]'", step)
        known = extras and set(extras[1].split(",")) <= set(project["optional-dependencies"])
        if not known and step not in in_ci:
            found.append(step)
    return found


@pytest.mark.parametrize("page", with_blocks("bash"), ids=lambda page: page.name)
def test_shell_commands_run_here_or_in_ci(page: Path, tmp_path: Path) -> None:
    environment = {**with_command(tmp_path / "scripts"), **QUICK_PROGRAMS}
    (tmp_path / "in.jsonl").write_text('{"query": "open", "items": ["Open a file.", "No."]}\n')
    for block in blocks(page, "bash"):
        if "packscore " in re.sub(r"'.*'", "", block):
            command = ["bash", "-ec", block]
            done = subprocess.run(
                command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
            )
            assert done.returncode == 0, done.stderr
        else:
            assert refused(block) == []


def test_a_command_that_nothing_runs_is_found() -> None:
    assert refused("pip install '.[test]' && pytest\n") == []
    assert refused("pip install '.[nothing]'\n") == ["pip install '.[nothing]'"]
    assert refused("pip install . && frobnicate --all\n") == ["frobnicate --all"]


def strange(text: str) -> list[str]:
    """Commands inside lines that name a script, a subcommand or an option that is not there."""
    group: Any = typer.main.get_command(app)
    found = []
    for line in re.findall(r"`((?:packscore|python) [^`\n]+)`", text):
        if "..." in line:  # a message that is quoted, or a command in short
            continue
        program, name, *options = line.split()
        if program == "python":
            missing = name.endswith(".py") and not (ROOT / name).exists()
        elif missing := name not in group.commands and name.isalpha() and name.islower():
            pass
        elif name in group.commands:
            known = {
                x
                for param in group.commands[name].params
                for x in param.opts + param.secondary_opts
            }
            missing = not {x for x in options if x.startswith("-") and len(x) > 1} <= known | {
                "--help"
            }
        if missing:
            found.append(line)
    return found


def test_commands_in_lines_are_there() -> None:
    for page in PAGES:
        assert strange(page.read_text()) == [], page.name
    text = (
        "`packscore rank - --frob` `packscore frob` `python benchmarks/frob.py` `packscore doctor`"
    )
    assert strange(text) == [
        "packscore rank - --frob",
        "packscore frob",
        "python benchmarks/frob.py",
    ]


def prose(page: Path) -> str:
    """A page without its code."""
    text = re.sub(r"^```.*?^```", "", page.read_text(), flags=re.MULTILINE | re.DOTALL)
    return re.sub(r"`[^`\n]*`", "", text)


def anchors(page: Path) -> set[str]:
    """What links may name behind a #, as GitHub makes it of headings."""
    text = re.sub(r"^```.*?^```", "", page.read_text(), flags=re.MULTILINE | re.DOTALL)
    headings = re.findall(r"^#+ (.*)$", text, re.MULTILINE)
    return {
        re.sub(r"[^\w\- ]", "", heading).strip().lower().replace(" ", "-") for heading in headings
    }


def dead_links(page: Path) -> list[str]:
    """Links to files of the repository, and to headings, that lead nowhere."""
    found = []
    for target in re.findall(r"\]\((?!https?:)([^)\s]+)\)", prose(page)):
        name, _, anchor = target.partition("#")
        path = page.parent / name if name else page
        if not path.exists() or (anchor and anchor not in anchors(path)):
            found.append(target)
    return found


def test_links_between_pages_lead_somewhere() -> None:
    for page in PAGES:
        assert dead_links(page) == [], page.name


def test_a_dead_link_is_found(tmp_path: Path) -> None:
    (tmp_path / "other.md").write_text("# Title\n```\n# no heading\n```\n## Two: words, `x`\n")
    page = tmp_path / "page.md"
    page.write_text(
        "[a](gone.md) [b](other.md#gone) [c](#gone) [d](other.md#no-heading) `[e](code.md)`\n"
        "[f](other.md#two-words-x) [g](other.md) [h](https://example.org/gone)\n"
    )
    assert dead_links(page) == ["gone.md", "other.md#gone", "#gone", "other.md#no-heading"]


def messages() -> list[str]:
    """Every text in the packages' code, a value that is put in as `...`."""
    found = []
    for path in [*ROOT.glob("plugin/**/*.py"), *ROOT.glob("jax_kernels/**/*.py")]:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.JoinedStr):
                parts = [getattr(value, "value", "...") for value in node.values]
                found.append("".join(x if isinstance(x, str) else "..." for x in parts))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                found.append(node.value)
    return found


def test_troubleshooting_quotes_messages_that_exist() -> None:
    page = (ROOT / "docs/troubleshooting.md").read_text().partition("## Errors")[2]
    texts, quoted = (
        messages(),
        re.findall(r"^\|(?: \w*Error[^|]*\|)? `([^|]*)` \|", page, re.MULTILINE),
    )
    assert len(quoted) > 80
    for cell in quoted:
        for message in cell.split("`, `"):
            parts = [re.escape(part) for part in message.split("...")]
            pattern = re.compile(".*".join(parts), re.DOTALL)
            assert any(pattern.search(text) for text in texts), message
    for name in packscore.__all__:
        if name.endswith("Error"):
            assert name in page, name


def test_the_shipped_model_tells_relevant_documents_apart() -> None:
    script = str(ROOT / "examples/train_reranker.py")
    command = [sys.executable, script, "--evaluate", "--pairs", "400"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    accuracy = float(re.search(r"pairwise accuracy: (\d\.\d+)", done.stdout)[1])
    assert accuracy >= 0.9
