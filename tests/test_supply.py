"""What an installation consists of: the bill of materials, and the page of licences."""

import json
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "licences.md"
TOOLS = {"audit", "lint", "test"}
"""Extras that a user does not install."""


def written(kind, out):
    subprocess.run([sys.executable, ROOT / "tests" / "checks" / "supply.py", kind, out], check=True)
    return out.read_text()


def canonical(name):
    return re.sub(r"[-_.]+", "-", name).lower()


def needed():
    """Names of the distributions that the extras of pyproject.toml name."""
    text = (ROOT / "pyproject.toml").read_text()
    extras = re.search(r"\[project.optional-dependencies\]\n(.*?)\n\[", text, re.DOTALL)[1]
    for extra, body in re.findall(r"^(\w+) = \[(.*?)\]$", extras, re.MULTILINE | re.DOTALL):
        if extra not in TOOLS:
            yield from (canonical(name) for name in re.findall(r'"([A-Za-z][\w-]*)', body) if name != "offramp")


def test_the_bill_of_materials_is_whole(tmp_path):
    bill = json.loads(written("sbom", tmp_path / "sbom.json"))
    assert (bill["bomFormat"], bill["specVersion"]) == ("CycloneDX", "1.6")
    references = {each["bom-ref"] for each in bill["components"]} | {bill["metadata"]["component"]["bom-ref"]}
    names = {canonical(each["name"]) for each in bill["components"]}
    assert {"numpy", "onnxruntime", "torch", *needed()} <= names
    assert len(references) == len(bill["components"]) + 1
    assert {each["ref"] for each in bill["dependencies"]} == references
    assert all(set(each["dependsOn"]) <= references - {each["ref"]} for each in bill["dependencies"])
    assert all(each["licenses"] for each in bill["components"])
    assert not {"pytest", "ruff", "bandit"} & names


def test_the_page_of_licences_names_every_distribution_of_the_extras(tmp_path):
    rows = re.findall(r"^\| ([\w.-]+) \| [\w.+-]+ \| ([^|]+) \| ([^|]+) \|$", PAGE.read_text(), re.MULTILINE)
    assert set(needed()) <= {canonical(name) for name, _, _ in rows}
    assert all(len(licence) < 120 for _, licence, _ in rows)
    found = re.findall(r"^\| ([\w.-]+) \|", written("licences", tmp_path / "licences.md"), re.MULTILINE)
    assert {name.lower() for name in found} >= {"numpy", "onnxruntime"}
