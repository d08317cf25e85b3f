"""The command ``fx-cache``."""

from __future__ import annotations

from importlib.metadata import version as installed_version
from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer(add_completion=False, no_args_is_help=True, help="Caching for diffusion transformers.")


@app.command()
def demo(
    out: Annotated[Path, typer.Option(help="Folder to write to.")] = Path("out/demo"),
    steps: Annotated[int, typer.Option(min=1, help="Denoising steps.")] = 50,
    repeats: Annotated[int, typer.Option(min=1, help="Generations each way; the median counts.")] = 3,
    compiler: Annotated[str | None, typer.Option(help="Inner compiler, and that of the plain model.")] = None,
) -> None:
    """Draws digits with a trained transformer, plainly compiled and cached, and compares them."""
    try:
        from fx_cache.demo.sheet import run_demo
    except ImportError as error:
        raise typer.BadParameter(f"{error}; install the demo's packages: pip install 'fx_cache[demo]'") from None
    run_demo(out, steps=steps, repeats=repeats, compiler=compiler)


@app.command()
def version() -> None:
    """Prints the version."""
    typer.echo(installed_version("fx_cache"))
