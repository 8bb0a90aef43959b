"""Every snippet of the README and the docs runs; what they print was printed; links lead on."""

from __future__ import annotations

import ast
import re
import shlex
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import packscore
from cli_helpers import Cli, with_command
from packscore import shipped_model_path

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
# what cannot be downloaded while testing goes through the same code as the shipped model
HUB_NAME = "Qwen/Qwen3-Reranker-0.6B"
# pages whose text blocks are what their snippets print
PRINTING = ("huggingface.md", "labels.md", "shapes.md", "training.md")


def blocks(page: Path, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", page.read_text(), re.MULTILINE | re.DOTALL)


def with_blocks(language: str) -> list[Path]:
    return [page for page in PAGES if blocks(page, language)]


def without_numbers(text: str) -> list[str]:
    """Words; scores, differences and times are other ones on other machines."""
    text = text.replace(str(shipped_model_path()), "MODEL")
    return re.sub(r"\b\d+\.\d+(e[+-]\d+)?\b|[\d,]+(?= items/s)", "0.x", text).split()


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
    if page.name in PRINTING:
        printed = without_numbers(capsys.readouterr().out)
        texts = blocks(page, "text")
        assert texts
        for shown in map(without_numbers, texts):
            assert any(printed[i : i + len(shown)] == shown for i in range(len(printed))), shown


@pytest.mark.parametrize(
    ("page", "script"),
    [("README.md", "examples/rerank.py"), ("docs/benchmarks.md", "benchmarks/host_work.py")],
)
def test_pages_show_what_scripts_print(page: str, script: str) -> None:
    command = [sys.executable, str(ROOT / script)]
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


@pytest.mark.parametrize("page", with_blocks("console"), ids=lambda page: page.name)
def test_console_shows_what_commands_print(
    page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    code, environment = 0, with_command(tmp_path / "scripts")
    for command, shown in sessions(page):
        if command.startswith("packscore "):
            words = shlex.split(command.replace("$MODEL", environment["MODEL"]))
            done = Cli(tmp_path)(*words[1:])
            code, printed = done.code, done.err + done.out
        else:
            shell = ["bash", "-c", f"(exit {code}); {command}"]
            found = subprocess.run(
                shell, capture_output=True, text=True, check=True, env=environment
            )
            printed = found.stdout
        assert without_numbers(printed) == without_numbers(shown), command


def steps(text: str) -> list[str]:
    """Commands joined by `&&` or newlines, without what changes nothing about them."""
    found = re.split(r"&&|\n", text)
    return [" ".join(re.sub(r"--quiet|\s-e\s", " ", step).split()) for step in found]


@pytest.mark.parametrize("page", with_blocks("bash"), ids=lambda page: page.name)
def test_shell_commands_run_here_or_in_ci(page: Path, tmp_path: Path) -> None:
    in_ci = steps((ROOT / ".ci/run").read_text())
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    environment = with_command(tmp_path / "scripts")
    (tmp_path / "in.jsonl").write_text('{"query": "open", "items": ["Open a file.", "No."]}\n')
    for block in blocks(page, "bash"):
        if "packscore " in re.sub(r"'.*'", "", block):
            command = ["bash", "-ec", block]
            done = subprocess.run(
                command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
            )
            assert done.returncode == 0, done.stderr
            continue
        for step in filter(None, steps(block)):
            extra = re.fullmatch(r"pip install '\.\[(\S+)\]'", step)
            assert extra[1] in extras["optional-dependencies"] if extra else step in in_ci


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
