"""The command ``fx-cache``."""

from __future__ import annotations

import json
import logging
import warnings
from importlib.metadata import version as installed_version
from pathlib import Path
from typing import Annotated, Any

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
def explain(
    name: Annotated[str, typer.Argument(metavar="CLASS", help="A class of diffusers, or package.module.Class.")],
    config: Annotated[Path | None, typer.Option(help="JSON: the constructor's arguments (a config.json).")] = None,
    inputs: Annotated[Path | None, typer.Option(help="JSON: the arguments of a call, described.")] = None,
    fn: Annotated[int, typer.Option(min=1, help="Fn_compute_blocks.")] = 1,
    bn: Annotated[int, typer.Option(min=0, help="Bn_compute_blocks.")] = 0,
    scope: Annotated[str, typer.Option(help="model or stack.")] = "model",
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Says what the backend finds in a transformer, and how it would be cached. Needs no weights.

    For every transformer of diffusers a small configuration and inputs are at hand. With --config the inputs' widths
    follow; where that does not suffice, or for other classes, --inputs describes them: a tensor as
    {"shape": [1, 16, 32], "dtype": "float32"} or {"values": [3], "dtype": "int64"}.
    """
    from fx_cache.config import CacheConfig
    from fx_cache.debug.explain import explain_with
    from fx_cache.debug.specimen import make_specimen
    from fx_cache.errors import FxCacheError

    try:
        options = CacheConfig(Fn_compute_blocks=fn, Bn_compute_blocks=bn, scope=scope)  # type: ignore[arg-type]
        specimen = make_specimen(name, _read(config), _read(inputs))
    except FxCacheError as error:
        raise typer.BadParameter(str(error)) from None
    logging.disable(logging.ERROR)  # what fails is told here, once
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            found = explain_with(options, specimen.model, **specimen.inputs)
    except Exception as error:
        text = (str(error).strip().splitlines() or [""])[0]
        raise typer.BadParameter(
            f"class {name}: got {type(error).__name__} ({text}) from its forward; expected inputs that it takes; "
            "describe them with --inputs FILE."
        ) from None
    typer.echo(json.dumps(found.to_dict(), indent=2) if as_json else str(found))


def _read(file: Path | None) -> dict[str, Any] | None:
    if file is None:
        return None
    try:
        found = json.loads(file.read_text())
    except (OSError, ValueError) as error:
        raise typer.BadParameter(f"{file}: got {error}; expected a JSON object; correct the file.") from None
    if not isinstance(found, dict):
        raise typer.BadParameter(f"{file}: got a {type(found).__name__}; expected a JSON object; correct the file.")
    return found


@app.command()
def version() -> None:
    """Prints the version."""
    typer.echo(installed_version("fx_cache"))
