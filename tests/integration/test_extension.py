"""A third-party package, installed from a temporary folder, adds a pruning criterion and a command."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import torch
from command_line import process

from axolotl_ivon import Posterior

PYPROJECT = """
[build-system]
requires = ["setuptools"]
build-backend = "setuptools.build_meta"

[project]
name = "ivon-example"
version = "1"

[project.entry-points.axolotl_ivon]
example = "ivon_example"

[tool.setuptools]
py-modules = ["ivon_example"]
"""

MODULE = '''
import click
from axolotl_ivon import hookimpl


@hookimpl
def pruning_criteria():
    return {"last-rows": lambda name, mean, sigma, random: 0 * mean - [[i] for i in range(len(mean))]}


@hookimpl
def register_commands(cli):
    @cli.command("count")
    @click.argument("adapter")
    def count(adapter):
        """Count the weights of ADAPTER."""
        from axolotl_ivon import Posterior

        click.echo(sum(tensor.numel() for tensor in Posterior.from_pretrained(adapter).mean.values()))
'''


def test_its_criterion_prunes_and_its_command_runs_and_is_in_the_help(tiny_adapter: Path, tmp_path: Path):
    source, site, out = tmp_path / "source", tmp_path / "site", tmp_path / "out"
    source.mkdir()
    (source / "pyproject.toml").write_text(PYPROJECT)
    (source / "ivon_example.py").write_text(MODULE)
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index", "--no-build-isolation"]
    subprocess.run([*pip, "--target", str(site), str(source)], check=True)

    def run(*arguments: object) -> str:
        environment = {**os.environ, "PYTHONPATH": f"{site}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"}
        return process(*arguments, env=environment, check=True).stdout

    run("prune", tiny_adapter, "--criterion", "last-rows", "--ratio", 0.25, "--scope", "tensor", "-o", out)
    for tensor in Posterior.from_pretrained(out).mean.values():
        rows = len(tensor) // 4
        assert torch.equal(tensor == 0, (torch.arange(len(tensor)) >= len(tensor) - rows)[:, None].expand_as(tensor))
    assert run("count", tiny_adapter) == "896\n"
    listed = run("--help")
    assert "Count the weights of ADAPTER." in listed
    assert listed.index("info ") < listed.index("sweep ")
