"""The command line: ``graph-capture demo | chat | bench | inspect | view | doctor | kernels | cache``."""

from __future__ import annotations

import json as text
from enum import StrEnum
from typing import Annotated, Any

import typer
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from typer.core import TyperGroup

from graph_capture.cli.console import quiet_downloads, show_error, show_table


class _Commands(TyperGroup):
    """A command's named error is one sentence, and exit code 1."""

    def invoke(self, ctx: Any) -> Any:
        from graph_capture.errors import CaptureError

        try:
            return super().invoke(ctx)
        except CaptureError as error:
            show_error(Console(stderr=True), error)
            raise typer.Exit(1) from error


app = typer.Typer(no_args_is_help=True, add_completion=False, help=__doc__, cls=_Commands)


class Bits(StrEnum):
    INT8, INT4 = "int8", "int4"


class DType(StrEnum):
    BFLOAT16 = "bfloat16"
    FLOAT16 = "float16"
    FLOAT32 = "float32"


class CacheAction(StrEnum):
    INFO = "info"
    CLEAR = "clear"


Weights = Annotated[DType, typer.Option("--dtype", help="Of the weights.")]
StoredWeights = Annotated[DType | None, typer.Option("--dtype", help="Of the weights (default: as they are stored).")]
Device = Annotated[str, typer.Option("--device", help="cpu or cuda (default: cuda where there is one).")]
Prompt = Annotated[int, typer.Option("--prompt", min=1, help="Tokens of the prompt.")]
Slots = Annotated[int, typer.Option("--slots", min=1, help="Slots of the static cache.")]
Layers = Annotated[int | None, typer.Option("--layers", min=1, help="Only so many layers.")]
Json = Annotated[bool, typer.Option("--json", help="Print JSON and nothing else.")]
Plot = Annotated[str | None, typer.Option("--plot", help="A PNG for a bar chart; needs matplotlib.")]


def _place(device: str) -> str:
    import torch

    return device or ("cuda" if torch.cuda.is_available() else "cpu")


def _can_plot(wanted: str | None) -> None:
    if wanted:
        try:
            import matplotlib.pyplot  # noqa: F401
        except ImportError as error:
            raise typer.BadParameter(f"{error}; install graph-capture[plot] for --plot") from error


def _version(asked: bool) -> None:
    if asked:
        import graph_capture

        print(f"graph-capture {graph_capture.__version__}")
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """Record a PyTorch forward pass, fuse it, replay it, with receipts."""
    quiet_downloads()


@app.command()
def demo(
    layers: Annotated[int, typer.Option(min=1, help="Decoder layers.")] = 4,
    hidden: Annotated[int, typer.Option(min=8, help="Hidden size.")] = 256,
    intermediate: Annotated[int, typer.Option(min=8, help="Size inside the MLP.")] = 688,
    heads: Annotated[int, typer.Option(min=1, help="Attention heads.")] = 8,
    kv_heads: Annotated[int, typer.Option(min=1, help="Key/value heads (grouped-query attention).")] = 2,
    vocab: Annotated[int, typer.Option(min=2, help="Vocabulary size.")] = 1024,
    length: Annotated[int, typer.Option(min=1, help="Tokens in the prompt.")] = 16,
    seed: Annotated[int, typer.Option(help="Seed of the weights and the prompts.")] = 0,
    kernel: Annotated[str, typer.Option(help="The kind of region whose kernel is shown.")] = "add_rms_norm",
    graph: Annotated[bool, typer.Option("--graph", help="Also print the rewritten graph.")] = False,
    compare: Annotated[bool, typer.Option("--compare", help="Also time torch.compile.")] = False,
    plot: Plot = None,
    talk: Annotated[bool, typer.Option(help="End with a few questions to the tiny model that comes along.")] = True,
    json: Json = False,
) -> None:
    """Record, fuse, check and replay a Llama, and talk to a tiny one; exits with 1 if a number or an answer is off."""
    from graph_capture.cli import demo as implementation

    if hidden % heads or heads % kv_heads:
        raise typer.BadParameter("--heads must divide --hidden, and --kv-heads must divide --heads")
    _can_plot(plot)
    shape = implementation.Shape(layers, hidden, intermediate, heads, kv_heads, vocab, length, seed)
    report = implementation.run(
        shape, Console(quiet=json), kernel=kernel, show_graph=graph, compare=compare, plot=plot, talk=talk
    )
    if json:
        print(report.to_json())
    raise typer.Exit(0 if report.ok else 1)


@app.command()
def inspect(
    model: Annotated[str, typer.Argument(help="A saved graph, a model's folder, llama-small and so on, a hub name.")],
    dtype: Weights = DType.BFLOAT16,
    device: Device = "",
    prompt: Prompt = 128,
    slots: Slots = 256,
    layers: Layers = None,
    measure: Annotated[bool, typer.Option(help="Time each region; else decide by what is known of it.")] = True,
    why: Annotated[str | None, typer.Option(help="Only what became of this module, value or region.")] = None,
    graph: Annotated[bool, typer.Option("--graph", help="Also print the rewritten graph.")] = False,
    json: Json = False,
) -> None:
    """Record a model with random weights, or open a saved graph, and show what is found in it and what is decided."""
    import torch

    from graph_capture.cli.inspect import inspect as implementation

    explained = {}
    sizes: dict[str, Any] = {"prompt": prompt, "slots": slots, "layers": layers, "measure": measure}
    try:
        for step, fused in implementation(model, dtype=getattr(torch, dtype), device=_place(device), **sizes):
            if json:
                explained[step] = text.loads(fused.explain().to_json())
                continue
            print(f"{step}: {len(fused.recorded.subgraph)} recorded ops, {len(fused.subgraph)} after the passes\n")
            print(f"{fused.why(why) if why else fused.explain()}\n")
            if graph:
                print(f"{fused.subgraph}\n")
    except KeyError as error:
        show_error(Console(stderr=True), error)
        raise typer.Exit(1) from error
    if json:
        print(text.dumps(explained, indent=2))


@app.command()
def view(
    model: Annotated[str, typer.Argument(help="A saved graph, a model's folder, llama-small and so on, a hub name.")],
    output: Annotated[str, typer.Option("--output", "-o", help="The page.")],
    dtype: Weights = DType.BFLOAT16,
    device: Device = "",
    prompt: Annotated[int | None, typer.Option(min=1, help="A prefill of so many tokens, not a decode step.")] = None,
    slots: Slots = 256,
    layers: Layers = None,
    measure: Annotated[bool, typer.Option(help="Time each region; else decide by what is known of it.")] = True,
) -> None:
    """Write one page of HTML that shows each stage of a model, or of a saved graph: regions, decisions, sources."""
    import torch

    from graph_capture.cli.inspect import inspect as implementation
    from graph_capture.cli.view import write

    sizes: dict[str, Any] = {"prompt": prompt or 1, "slots": slots, "layers": layers, "measure": measure}
    steps = implementation(model, dtype=getattr(torch, dtype), device=_place(device), **sizes)
    step, fused = next(found for found in steps if prompt is None or not found[0].startswith("decode"))
    print(write(fused, output, model if step == "saved" else f"{model}: {step}"))


@app.command()
def doctor(
    model: Annotated[str, typer.Argument(help="A model's folder, llama-small and so on, a hub name.")],
    dtype: Weights = DType.FLOAT32,
    device: Device = "",
    prompt: Prompt = 32,
    layers: Layers = None,
    compare: Annotated[bool, typer.Option(help="Also examine torch.compile.")] = True,
    json: Json = False,
) -> None:
    """Run a model in several ways beside float64: which is off, by how much, since which op. Exits with 1 if one is."""
    import torch

    from graph_capture.cli.doctor import examine

    diagnosis = examine(model, getattr(torch, dtype), _place(device), prompt, layers, compare)
    print(diagnosis.to_json() if json else diagnosis)
    raise typer.Exit(0 if diagnosis.ok else 1)


@app.command()
def kernels(
    model: Annotated[str, typer.Argument(help="A saved graph, a model's folder, llama-3-8b and the like, a hub name.")],
    target: Annotated[str, typer.Option(help="The GPU's architecture.")] = "sm_90",
    dtype: Weights = DType.BFLOAT16,
    prompt: Prompt = 128,
    slots: Slots = 2048,
    layers: Layers = None,
    json: Json = False,
) -> None:
    """Compile every kernel that a model needs, without a GPU and without its weights, and show the machine code."""
    import torch

    from graph_capture.cli.kernels import report

    compiled = report(model, target, dtype=getattr(torch, dtype), prompt=prompt, slots=slots, layers=layers)
    if json:
        print(text.dumps(compiled.to_dict(), indent=2))
        return
    console = Console()
    show_table(compiled.table(), console)
    for kind, reason in compiled.refused.items():
        console.print(f"no kernel for {kind}: {reason}", soft_wrap=True, highlight=False)


@app.command()
def chat(
    model: Annotated[
        str | None,
        typer.Option(help="A folder, a GGUF file, llama-tiny and so on, a hub name (default: a tiny one)."),
    ] = None,
    dtype: StoredWeights = None,
    device: Device = "",
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Of an answer.")] = 128,
    max_length: Annotated[
        int | None, typer.Option(min=2, help="Tokens of a conversation (default: what the model and memory allow).")
    ] = None,
    temperature: Annotated[
        float | None, typer.Option(help="0 takes the most likely token (default, here and below: as the model has it).")
    ] = None,
    top_k: Annotated[int | None, typer.Option(help="Choose among so many tokens; 0: among all.")] = None,
    top_p: Annotated[
        float | None, typer.Option(help="Choose among the fewest tokens that are this likely together.")
    ] = None,
    min_p: Annotated[
        float | None, typer.Option(help="Leave out what is less likely than this part of the best.")
    ] = None,
    repetition_penalty: Annotated[float | None, typer.Option(help="1: none.")] = None,
    seed: Annotated[int | None, typer.Option(help="Of the random choices.")] = None,
    quantize: Annotated[Bits | None, typer.Option(help="Round the weights to so many bits first.")] = None,
    fusion: Annotated[bool, typer.Option(help="Capture and fuse the model's steps.")] = True,
    system: Annotated[str | None, typer.Option(help="A message that says how to answer.")] = None,
) -> None:
    """Talk to a model; answers lines from a pipe too. Exits with 1 if a line got no answer."""
    import torch

    from graph_capture.cli.chat import run

    ok = run(
        model,
        device=device or None,
        dtype=getattr(torch, dtype) if dtype else None,
        quantize=quantize,
        fusion=fusion,
        system=system,
        max_new_tokens=max_new_tokens,
        max_length=max_length,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        min_p=min_p,
        repetition_penalty=repetition_penalty,
        seed=seed,
    )
    raise typer.Exit(0 if ok else 1)


@app.command()
def bench(
    model: Annotated[str, typer.Option(help="A model's folder, or a name on the hub.")] = "",
    config: Annotated[str, typer.Option(help="A built-in configuration with random weights: llama-3-8b ...")] = "",
    dtype: StoredWeights = None,
    device: Device = "",
    prompt: Prompt = 128,
    tokens: Annotated[int, typer.Option(min=1, help="Tokens that are decoded, in each round.")] = 64,
    batch: Annotated[int, typer.Option(min=1, help="Sequences at once.")] = 1,
    rounds: Annotated[int, typer.Option(min=1, help="Rounds in which the ways take turns.")] = 5,
    starts: Annotated[bool, typer.Option(help="Also measure cold and warm starts, in processes of their own.")] = True,
    compare: Annotated[bool, typer.Option(help="Also measure torch.compile.")] = True,
    plot: Plot = None,
    markdown: Annotated[bool, typer.Option("--markdown", help="Print the table as markdown.")] = False,
    json: Json = False,
) -> None:
    """Time a model end to end: eager transformers, torch.compile, the engine without and with fusion."""
    import torch

    from graph_capture.cli import bench as implementation
    from graph_capture.cli.ways import COMPILED, WAYS, Setting

    if bool(model) == bool(config):
        raise typer.BadParameter("give either --model or --config")
    _can_plot(plot)
    where = _place(device)
    threads = 0 if where == "cuda" else torch.get_num_threads()
    setting = Setting(model or config, where, dtype or "auto", prompt, tokens, batch, rounds, threads)
    ways = tuple(way for way in WAYS if compare or way != COMPILED)
    with Console(stderr=True).status("...") as status:
        report = implementation.run(setting, ways, starts=starts, progress=status.update)
    if plot:
        implementation.plot(report, plot)
    if json:
        print(text.dumps(report.to_dict(), indent=2))
    elif markdown:
        print(report.markdown())
    else:
        show_table(report.table())
    if not json:
        for line in report.notes():
            print(line)
    raise typer.Exit(0 if report.ok else 1)


@app.command()
def cache(
    action: Annotated[CacheAction, typer.Argument(help="Show what there is, or remove it.")] = CacheAction.INFO,
    folder: Annotated[str | None, typer.Option(help="The cache folder (default: the user's).")] = None,
    json: Json = False,
) -> None:
    """Show or clear the folder of compiled kernels, measured decisions and recorded patterns."""
    from graph_capture.cache import Usage, cache_folder, clear, contents, size_limit
    from graph_capture.runtime.account.explain import format_bytes
    from graph_capture.runtime.decide.decision_store import DecisionStore

    path = cache_folder(folder)
    console = Console()
    if action is CacheAction.CLEAR:
        count, size = clear(path)
        if json:
            print(text.dumps({"path": str(path), "removed": count, "bytes": size}))
        else:
            console.print(f"removed {count} files, {format_bytes(size)}, from {path}", soft_wrap=True)
        return
    kinds = {"kernels": Usage()} | contents(path)
    kinds["decisions"] = kinds.get("decisions", Usage())._replace(entries=len(DecisionStore(folder)))
    limit = size_limit()
    if json:
        usages = {kind: usage._asdict() for kind, usage in kinds.items()}
        print(text.dumps({"path": str(path), **usages, "limit": limit}))
        return
    table = Table("what", box=SIMPLE_HEAD)
    for column in ("entries", "files", "bytes"):
        table.add_column(column, justify="right")
    for kind, usage in sorted(kinds.items()):
        table.add_row(kind, str(usage.entries), str(usage.files), format_bytes(usage.bytes))
    table.add_section()
    files, size = (sum(getattr(usage, name) for usage in kinds.values()) for name in ("files", "bytes"))
    table.add_row("all", "", str(files), format_bytes(size))
    table.add_row("at most", "", "", format_bytes(limit) if limit else "no limit")
    Console().print(str(path), soft_wrap=True)
    show_table(table)


def main() -> None:
    """The entry point of ``graph-capture``."""
    app()


if __name__ == "__main__":
    main()
