"""The documentation: the tests and files that it names exist, and its configuration files have no problems."""

from __future__ import annotations

import ast
import functools
import os
import re
import shutil
import subprocess
import textwrap
from pathlib import Path
from xml.etree import ElementTree

import pytest

from ringplane.control.config import examine

TESTS = Path(__file__).parents[1]
REPOSITORY = TESTS.parent
PACKAGE = REPOSITORY / "src/ringplane"
PAGES = sorted([*REPOSITORY.glob("*.md"), *(REPOSITORY / "docs").rglob("*.md")])


@pytest.fixture(params=PAGES, ids=lambda path: str(path.relative_to(REPOSITORY)))
def page(request: pytest.FixtureRequest) -> Path:
    return Path(request.param)


@functools.cache
def functions(path: Path) -> set[str]:
    """The names of the tests in a file."""
    return {node.name for node in ast.parse(path.read_text()).body if isinstance(node, ast.FunctionDef)}


def test_files_of_tests_exist(page: Path) -> None:
    for name in re.findall(r"(?:unit|program|guest|storage|hostile)/[\w\-]+\.?\w*", page.read_text()):
        assert (TESTS / name.rstrip(".")).exists(), name


def missing_modules(text: str) -> list[str]:
    """Those of the modules that a text names, as `folder/module.py`, that the package does not have."""
    folders = "|".join(path.parent.name for path in PACKAGE.glob("*/__init__.py"))
    named = re.findall(rf"(?<![\w/])(?:src/ringplane/)?((?:{folders})/(?:\w+/)*\w+\.py)", text)
    return [name for name in named if not (PACKAGE / name).exists()]


def test_modules_exist(page: Path) -> None:
    # That page describes one change of the messages, with the files of its time.
    if page.name != "messages.md":
        assert missing_modules(page.read_text()) == []


@pytest.mark.parametrize("path", sorted(PACKAGE.rglob("*.py")), ids=lambda path: str(path.relative_to(PACKAGE)))
def test_modules_exist_that_comments_name(path: Path) -> None:
    """With their folder, or without it. In quotes it is a file of another package."""
    assert missing_modules(path.read_text()) == []
    # Also files of users, as messages call them.
    files = {"FILE.py", "faults.py", *(each.name for folder in (PACKAGE, TESTS) for each in folder.rglob("*.py"))}
    assert set(re.findall(r'(?<![\w/"])\w+\.py\b', path.read_text())) <= files


def test_tests_exist(page: Path) -> None:
    text = page.read_text()
    known = set.union(*(functions(path) for path in TESTS.rglob("test_*.py")))
    for name in re.findall(r"\btest_\w+\b(?!\.py)", text):
        assert name in known
    for file, part in re.findall(r"(\w+/test_\w+\.py), (\w+)(?![\w/])", text):
        assert any(part in name for name in functions(TESTS / file)), f"{file}, {part}"


def test_linked_files_exist(page: Path) -> None:
    """Relative links, in Markdown and in HTML: other pages, directories, pictures."""
    text = page.read_text()
    for link in re.findall(r"\]\(([^)#\s]+)", text) + re.findall(r'(?:src|srcset|href)="([^"#]+)"', text):
        assert re.match(r"[a-z]+:", link) or (page.parent / link).exists(), link


def anchors(page: Path) -> set[str]:
    """The anchors that GitHub derives from a page's headings."""
    headings = re.findall(r"^#+ (.*)$", page.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_linked_headings_exist(page: Path) -> None:
    for link, anchor in re.findall(r"\]\(([^)#\s:]*)#([^)\s]+)\)", page.read_text()):
        assert anchor in anchors(page.parent / link if link else page), f"{link}#{anchor}"


def toml_blocks(text: str) -> list[str]:
    """The configuration files of a page: indented, fenced, or in a here-document, from their first table on."""
    indented = re.findall(r"(?:^(?:    .*)?\n)+", text, re.MULTILINE)
    marked = re.findall(r"(?:<<'END'|```toml)\n(.*?)^(?:END|```)$", text, re.MULTILINE | re.DOTALL)
    first_table = re.compile(r"^\[\[?[a-z][\w.-]*\]\]?\n.*", re.MULTILINE | re.DOTALL)
    found = [first_table.search(textwrap.dedent(block)) for block in (*indented, *marked)]
    return [each[0] for each in found if each]


def test_configuration_files_have_no_problems(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # An example names two CPUs.
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {0, 1})
    for number, block in enumerate(toml_blocks(page.read_text())):
        path = tmp_path / f"{number}.toml"
        path.write_text(block)
        config, problems = examine(path)
        assert problems == [], block
        assert config.disks or config.api or config.metrics, block


def test_configuration_files_are_found() -> None:
    pages = (REPOSITORY / "README.md", REPOSITORY / "docs" / "config.md", REPOSITORY / "docs" / "limits.md")
    assert [len(toml_blocks(page.read_text())) for page in pages] == [1, 1, 2]


# libvirt's schemas, of Debian's package libvirt0.
SCHEMAS = Path("/usr/share/libvirt/schemas")

# What each domain needs, and what an excerpt leaves out.
REST = "<name>guest</name><memory>1048576</memory><os><type arch='x86_64' machine='q35'>hvm</type></os>"


def xml_blocks(text: str) -> list[str]:
    """What a page has of libvirt's domains: fenced, or indented."""
    fence = re.compile(r"^```\w*\n(.*?)^```$", re.MULTILINE | re.DOTALL)
    indented = map(textwrap.dedent, re.findall(r"(?:^(?: {4}.*)?\n)+", fence.sub("", text), re.MULTILINE))
    blocks = (*fence.findall(text), *indented)
    return [block for block in blocks if re.match(r"\s*<(domain|memoryBacking|devices|disk)\b", block)]


def whole_domain(excerpt: str) -> str:
    """A domain that has this element, and all that is missing around it."""
    element = ElementTree.fromstring(excerpt)
    domain = element if element.tag == "domain" else ElementTree.Element("domain", {"type": "kvm"})
    if element is not domain:
        around = domain if element.tag in ("memoryBacking", "devices") else ElementTree.SubElement(domain, "devices")
        around.append(element)
    missing = ElementTree.fromstring(f"<rest>{REST}</rest>")
    domain.extend(each for each in missing if domain.find(each.tag) is None)
    return ElementTree.tostring(domain, encoding="unicode")


def schema_errors(domain: str) -> str:
    """What libvirt's schema says of it; empty: it is valid."""
    if shutil.which("xmllint") is None or not SCHEMAS.exists():
        assert os.environ.get("CI") != "true", "CI must not skip this test"
        pytest.skip("libvirt's schemas or xmllint are missing (Debian: libvirt0, libxml2-utils)")
    command = ["xmllint", "--noout", "--relaxng", str(SCHEMAS / "domain.rng"), "-"]
    done = subprocess.run(command, input=domain, capture_output=True, text=True)
    return done.stderr if done.returncode else ""


def test_libvirt_accepts_the_domains(page: Path) -> None:
    for block in xml_blocks(page.read_text()):
        assert schema_errors(whole_domain(block)) == "", block


def test_domains_are_found_and_checked() -> None:
    (block,) = xml_blocks((REPOSITORY / "README.md").read_text())
    assert schema_errors(whole_domain(block)) == ""
    assert "fails to validate" in schema_errors(whole_domain(block.replace("vhostuser", "vhost-user")))
    assert "fails to validate" in schema_errors(whole_domain(block.replace("queues='2'", "queues='two'")))
    disk = re.search(r"<disk .*</disk>", block, re.DOTALL)
    assert disk
    assert schema_errors(whole_domain(disk[0])) == ""
