"""The ``freemerge`` command: argument parsing and printing only.

What a command runs is imported when it runs, so that help and wrong arguments do not wait for torch.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

from . import __version__
from .errors import ArgumentError, FreemergeError, RefusedError
from .merging.recipe import PRESETS, Recipe
from .merging.schema import recipe_schema
from .merging.selection import Action
from .methods import METHODS
from .methods.filtered import Filter
from .methods.parameters import FLAG, Parameter, parameters_of
from .methods.rules import Scope

if TYPE_CHECKING:
    from .merging.inspection import Inspection
    from .merging.run import Report

_SIZES = {"TB": 10**12, "GB": 10**9, "MB": 10**6, "KB": 10**3}
MERGEKIT = "mergekit-yaml"
DONE, FAILED, USAGE, REFUSED, INTERRUPTED = 0, 1, 2, 3, 130


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit code: 0 done, 1 failed, 2 wrong usage, 3 refused, 130 interrupted,
    143 terminated."""
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # threads that wait must not take time from those that read
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    if arguments[:1] == [MERGEKIT]:  # all that follows is for mergekit
        options = argparse.Namespace(run=_mergekit, arguments=arguments[1:])
    else:
        options = _parser().parse_args(arguments)
    before = _identity(getattr(options, "out", None))
    try:
        code = int(options.run(options))
        sys.stdout.flush()
        return code
    except ArgumentError as error:
        return _complain(error, USAGE)
    except RefusedError as error:
        return _complain(error, REFUSED)
    except FreemergeError as error:
        return _complain(error, FAILED)
    except BrokenPipeError:  # the reader has closed the pipe; the flush at exit must not fail again
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return FAILED
    except OSError as error:
        return _complain(f"{error.filename}: {error.strerror}" if error.filename else error, FAILED)
    except KeyboardInterrupt as stop:
        out = getattr(options, "out", None)
        written = f"{out} was written" if out is not None and _identity(out) != before else "no output was written"
        return _complain(f"{str(stop) or 'interrupted'}; {written}", getattr(stop, "code", INTERRUPTED))


def _identity(out: Path | None) -> object:
    """What tells an output from the one that is put in its place."""
    try:
        status = os.stat(out) if out is not None else None
    except OSError:
        return None
    return status and (status.st_dev, status.st_ino)


def _complain(error: object, code: int) -> int:
    print(f"freemerge: {_printable(error)}", file=sys.stderr)
    return code


class _Parser(argparse.ArgumentParser):
    """A parser that may add its arguments when it is about to parse."""

    fill: Callable[[argparse.ArgumentParser], None] | None = None

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        if self.fill is not None:
            self.fill(self)
        return super().parse_known_args(args, namespace)


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="freemerge",
        description="Merge fine-tuned models of one base in the frequency domain.",
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"freemerge {__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    merging = commands.add_parser("merge", allow_abbrev=False, help="merge checkpoints into one")
    _add_inputs(merging)
    merging.add_argument("-o", "--out", required=True, type=Path, help="output directory or .safetensors file")
    merging.add_argument("--dry-run", action="store_true", help="check everything, print the plan, write nothing")
    merging.add_argument("--force", action="store_true", help="replace an existing output")
    merging.add_argument("--resume", action="store_true", help="go on with the same merge where it was killed")
    _add_tokenizer(merging)
    merging.add_argument(
        "--max-shard-size", type=_size, default="5GB", metavar="SIZE", help="for instance 2GB (default 5GB)"
    )
    merging.add_argument("--quiet", action="store_true", help="print nothing but errors")
    merging.add_argument(
        "--log-json", action="store_true", help="instead of a progress bar, print one JSON object a line"
    )
    merging.add_argument(
        "--memory",
        type=_size,
        default="128MB",
        metavar="SIZE",
        help="tensors that are read ahead, and that may wait to be written, beside those at work (default 128MB)",
    )
    merging.set_defaults(run=_merge)

    inspecting = commands.add_parser("inspect", allow_abbrev=False, help="what a merge would do to each tensor")
    _add_inputs(inspecting)
    _add_tokenizer(inspecting)
    inspecting.set_defaults(run=_inspect)

    analysing = commands.add_parser(
        "analyze", allow_abbrev=False, help="what the task vectors have in common, before and after merging: a report"
    )
    _add_models(analysing)
    analysing.add_argument("-o", "--out", type=Path, metavar="REPORT.html", help="write the report to this file")
    analysing.add_argument("--force", action="store_true", help="replace an existing report")
    analysing.add_argument(
        "--methods", type=lambda text: text.split(","), metavar="NAME,...", help="methods of merging to compare"
    )
    _add_names(analysing)
    analysing.add_argument("--json", action="store_true", help="print everything as JSON")
    analysing.set_defaults(run=_analyze)

    extracting = commands.add_parser("experts", allow_abbrev=False, help="extract a light expert of each model")
    extracting.fill = _add_experts
    extracting.set_defaults(run=_experts)

    evaluating = commands.add_parser("evaluate", allow_abbrev=False, help="score models with your own function")
    evaluating.add_argument("models", type=Path, nargs="+", metavar="MODEL", help="checkpoints to score")
    evaluating.add_argument(
        "--function", required=True, metavar="FILE.py:NAME", help="takes a state dict, returns a score or {task: score}"
    )
    evaluating.add_argument(
        "--experts", type=Path, metavar="DIR", help="score each task of the first model with its expert from here, too"
    )
    evaluating.add_argument("--json", action="store_true", help="print the result as JSON")
    evaluating.set_defaults(run=_evaluate)

    tuning = commands.add_parser(
        "tune", allow_abbrev=False, help="learn the weights of a merge from unlabelled data, into a recipe"
    )
    _add_inputs(tuning)
    tuning.add_argument("-o", "--out", required=True, type=Path, metavar="RECIPE.yaml", help="new file for the recipe")
    tuning.add_argument(
        "--function",
        required=True,
        metavar="FILE.py:NAME",
        help="takes a state dict, yields logits of unlabelled batches",
    )
    tuning.add_argument("--by", choices=("task", "layer"), default="task", help="a weight for each (default task)")
    tuning.add_argument("--iterations", type=int, default=100, metavar="N", help="of Adam (default 100)")
    tuning.add_argument("--rate", type=float, default=0.01, metavar="R", help="of Adam (default 0.01)")
    tuning.set_defaults(run=_tune)

    verifying = commands.add_parser("verify", allow_abbrev=False, help="check a merged directory against its manifest")
    verifying.add_argument("directory", type=Path)
    verifying.set_defaults(run=_verify)

    differing = commands.add_parser("diff", allow_abbrev=False, help="how two checkpoints differ, tensor by tensor")
    differing.add_argument("first", metavar="A", help="a checkpoint")
    differing.add_argument("second", metavar="B", help="another one")
    differing.add_argument("--json", action="store_true", help="print one JSON object a line")
    differing.set_defaults(run=_diff)

    schema = commands.add_parser("schema", allow_abbrev=False, help="print the JSON schema of recipes, for editors")
    schema.set_defaults(run=_schema)

    cleaning = commands.add_parser("clean", allow_abbrev=False, help="remove what killed runs left in a directory")
    cleaning.add_argument("directory", type=Path, help="where outputs are written")
    cleaning.add_argument("--dry-run", action="store_true", help="report it only")
    cleaning.set_defaults(run=_clean)

    demonstrating = commands.add_parser(
        "demo", allow_abbrev=False, help="train, merge and compare small real models (about a minute)"
    )
    demonstrating.add_argument("--seed", type=int, default=0)
    demonstrating.add_argument("--keep", type=Path, metavar="DIR", help="keep the checkpoints in this directory")
    demonstrating.set_defaults(run=_demo)

    listing = commands.add_parser(
        "backends", allow_abbrev=False, help="what can filter on this machine, and if not, why"
    )
    listing.set_defaults(run=_backends)

    # Listed for the help; main() hands its arguments over.
    commands.add_parser(MERGEKIT, add_help=False, help="mergekit's own command, with freemerge's methods in it")
    return parser


def _add_experts(parser: argparse.ArgumentParser) -> None:
    from .experts.rescale import RULES
    from .experts.values import CODINGS

    def rescale(text: str) -> str | float:
        return text if text in RULES else _number(text, f"{', '.join(RULES)} or a number")

    _add_models(parser)
    parser.add_argument("-o", "--out", required=True, type=Path, help="new directory for the expert files")
    parser.add_argument("--density", type=float, metavar="D", help="share of entries kept (default 0.01)")
    parser.add_argument("--scope", choices=get_args(Scope), default="tensor")
    parser.add_argument(
        "--rescale", type=rescale, default="auto", metavar="R", help=f"{', '.join(RULES)}, or mu itself (default auto)"
    )
    parser.add_argument("--values", choices=list(CODINGS), help="default bf16; svd2 with --budget or --rank")
    parser.add_argument("--trim", type=float, default=0.0, metavar="T", help="share of the largest left out")
    parser.add_argument(
        "--backbone", type=Path, metavar="MERGED", help="merged model, for what follows and some --rescale"
    )
    parser.add_argument(
        "--budget",
        metavar="SHARE",
        help="low-rank experts of what MERGED lacks, in files of this share of a model: 0.3%%",
    )
    parser.add_argument("--rank", type=int, metavar="R", help="or with R components of each matrix")
    _add_names(parser)
    parser.add_argument("--json", action="store_true", help="print the result as JSON")


def _add_models(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("base", type=Path, metavar="BASE", help="the pretrained checkpoint all models started from")
    parser.add_argument("models", type=Path, nargs="+", metavar="MODEL", help="fine-tuned checkpoints")


def _add_inputs(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "base", type=Path, nargs="?", metavar="BASE", help="the pretrained checkpoint all models started from"
    )
    parser.add_argument("models", type=Path, nargs="*", metavar="MODEL", help="fine-tuned checkpoints")
    parser.add_argument(
        "--mergekit", type=Path, metavar="FILE", help="base, models and method as a configuration of mergekit has them"
    )
    parser.add_argument("--preset", choices=list(PRESETS), help="start from a published setting")
    parser.add_argument("--recipe", type=Path, metavar="FILE", help="start from a recipe in YAML")
    parser.add_argument("--method", choices=sorted(METHODS), help="merging method (default fr, or the recipe's)")
    for name, common in parameters_of(Recipe).items():
        _add_parameter(parser, name, [common], common.help)
    _add_names(parser)
    parser.add_argument("--backend", default="auto", help="auto or one of those that `freemerge backends` lists")
    parser.add_argument("--json", action="store_true", help="print the result as JSON")
    group = parser.add_argument_group("parameters of the methods")
    for name, users in _method_parameters().items():
        meanings: dict[str, list[str]] = {parameter.help: [] for parameter in users.values()}
        for method, parameter in users.items():
            meanings[parameter.help].append(method)
        help = "; ".join(f"{meaning} [{', '.join(methods)}]" for meaning, methods in meanings.items())
        _add_parameter(group, name, list(users.values()), help)


def _method_parameters() -> dict[str, dict[str, Parameter]]:
    """Every parameter of a method, or of a filter around it: its name, and what it is for each that has it."""
    found: dict[str, dict[str, Parameter]] = {}
    for method, cls in sorted(METHODS.items()):
        for name, parameter in parameters_of(cls).items():
            found.setdefault(name, {})[method] = parameter
    for name, parameter in parameters_of(Filter).items():
        found.setdefault(name, {})["filter"] = parameter
    return found


def _add_parameter(parser: argparse._ActionsContainer, name: str, uses: Sequence[Parameter], help: str) -> None:
    """The option of a parameter. Its text is read when the method is known."""
    help = help.replace("%", "%%")
    if all(use.kind is FLAG for use in uses):
        parser.add_argument(_flag(name), action=argparse.BooleanOptionalAction, help=help)
        return
    choices = dict.fromkeys(choice or "none" for use in uses for choice in use.choices)
    kinds = dict.fromkeys(use.kind.metavar for use in uses if use.kind is not None)
    parser.add_argument(_flag(name), metavar="|".join([*choices, *kinds]), help=help)


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def _add_names(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--select",
        type=_rule,
        action="append",
        metavar="PATTERN=ACTION",
        help=", ".join(get_args(Action)) + "; repeatable",
    )
    parser.add_argument(
        "--rename",
        type=_renaming,
        action="append",
        metavar="OLD=NEW",
        help="names of models that begin with OLD begin with NEW instead, as the base's do; repeatable",
    )


def _add_tokenizer(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--tokenizer-from",
        type=_tokenizer,
        default="base",
        metavar="WHICH",
        help="tokenizer, chat template and generation settings of base, of the model of that number (from 0), or auto: "
        "the models', if all have the same",
    )


def _recipe(options: argparse.Namespace) -> Recipe:
    """The preset or the file, with every option that was given laid over it; base and models, too, of mergekit's."""
    if sum(map(bool, (options.preset, options.recipe, options.mergekit))) > 1:
        raise ArgumentError("--preset, --recipe and --mergekit exclude each other")
    if options.mergekit:
        from .merging.mergekit_yaml import read_mergekit

        if options.base is not None:
            raise ArgumentError("--mergekit names base and models; give no others")
        options.base, options.models, recipe = read_mergekit(options.mergekit)
    elif options.base is None or not options.models:
        raise ArgumentError("BASE and at least one MODEL are required")
    elif options.recipe:
        recipe = Recipe.from_yaml(options.recipe)
    else:
        recipe = Recipe.preset(options.preset) if options.preset else Recipe()
    changes: dict[str, Any] = {} if options.method is None else {"method": options.method}
    method = type(recipe.method) if options.method is None else METHODS[options.method]
    known = parameters_of(Recipe) | parameters_of(method)
    if options.filter is not None or recipe.filter is not None:
        known |= parameters_of(Filter)
    for name in (*parameters_of(Recipe), *_method_parameters()):
        value = getattr(options, name)
        if value is None:
            continue
        if name not in known:
            raise ArgumentError(f"method {method.name} has no option {_flag(name)}")
        changes[name] = value if isinstance(value, bool) else known[name].parse(_flag(name), value)
    if options.select is not None:
        changes["select"] = (*options.select, *recipe.select)
    if options.rename is not None:
        changes["rename"] = (*options.rename, *recipe.rename)
    return recipe.replace(**changes)


def _merge(options: argparse.Namespace) -> int:
    if options.dry_run:
        checks = {"out": options.out, "force": options.force, "max_shard_bytes": options.max_shard_size}
        return _inspect(options, **checks)
    recipe = _recipe(options)
    from .merging.run import merge_checkpoints

    silent = options.json or options.quiet or options.log_json
    report = merge_checkpoints(
        options.base,
        options.models,
        options.out,
        recipe,
        backend=options.backend,
        force=options.force,
        max_shard_bytes=options.max_shard_size,
        memory=options.memory,
        resume=options.resume,
        progress="json" if options.log_json else not (options.json or options.quiet),
        tokenizer_from=options.tokenizer_from,
        on_start=lambda inspection: None if silent else _print_warnings(inspection),
    )
    if options.json:
        print(json.dumps(_plain(report)))
    elif not options.quiet:
        _print_report(report, recipe)
        if not options.log_json:
            _print_stages(report)
    return DONE


def _inspect(options: argparse.Namespace, **checks: Any) -> int:
    recipe = _recipe(options)
    from .merging.run import inspect

    checks |= {"backend": options.backend, "tokenizer_from": options.tokenizer_from}
    inspection = inspect(options.base, options.models, recipe, **checks)
    if options.json:
        print(json.dumps(_plain(inspection)))
    else:
        _print_inspection(inspection)
    return DONE


def _analyze(options: argparse.Namespace) -> int:
    from .analysis import analyze

    chosen = {} if options.methods is None else {"methods": options.methods}
    analysis = analyze(
        options.base,
        options.models,
        select=options.select or (),
        rename=options.rename or (),
        out=options.out,
        force=options.force,
        progress=not options.json,
        **chosen,
    )
    print(json.dumps(analysis.to_dict()) if options.json else _printable(analysis.to_text()))
    if options.out is not None and not options.json:
        print(f"report: {options.out}")
    return DONE


def _experts(options: argparse.Namespace) -> int:
    from .experts import iter_experts, save_experts

    experts = iter_experts(
        options.base,
        options.models,
        density=options.density,
        scope=options.scope,
        rescale=options.rescale,
        values=options.values,
        trim=options.trim,
        backbone=options.backbone,
        budget=options.budget,
        rank=options.rank,
        select=options.select or (),
        rename=options.rename or (),
    )
    saved = save_experts(experts, options.out)
    if options.json:
        print(json.dumps(_plain(saved)))
        return DONE
    for expert in saved:
        print(f"{expert.task}: {expert.entries} entries, mu {expert.mu:.4g}, {expert.nbytes / 1e6:.3g} MB")
    return DONE


def _evaluate(options: argparse.Namespace) -> int:
    from .evaluation import evaluate, evaluate_experts, load_function, table

    function = load_function(options.function)
    evaluations = [evaluate(model, function) for model in options.models]
    if options.experts is not None:
        evaluations.append(evaluate_experts(options.models[0], options.experts, function))
    print(json.dumps(_plain(evaluations)) if options.json else table(evaluations))
    return DONE


def _tune(options: argparse.Namespace) -> int:
    if options.out.exists():
        raise RefusedError(f"{options.out} exists")
    recipe = _recipe(options)
    from .evaluation import load_function
    from .tuning import tune

    tuned = tune(
        options.base,
        options.models,
        recipe,
        load_function(options.function),
        by=options.by,
        iterations=options.iterations,
        rate=options.rate,
        backend=options.backend,
    )
    options.out.write_text(tuned.recipe.to_yaml(), encoding="utf-8")
    if options.json:
        print(json.dumps({"recipe": tuned.recipe.to_config(), "entropies": tuned.entropies}))
        return DONE
    first, last = tuned.entropies[0], tuned.entropies[-1]
    weights = ", ".join(f"{weight:.4f}" for weight in tuned.recipe.weights)
    layers = f" and of {len(tuned.recipe.layers)} layers" if tuned.recipe.layers else ""
    print(f"{options.out}: weights {weights}{layers}; entropy {first:.4f} -> {last:.4f}")
    return DONE


def _verify(options: argparse.Namespace) -> int:
    from .checkpoint import verify

    problems = verify(options.directory)
    for problem in problems:
        print(problem)
    print("verified" if not problems else f"{len(problems)} problems")
    return FAILED if problems else DONE


def _diff(options: argparse.Namespace) -> int:
    from .checkpoint import diff

    found = 0
    for difference in diff(options.first, options.second):
        found += 1
        if options.json:
            print(json.dumps(_plain(difference)))
            continue
        told = difference.kind
        if difference.first != difference.second:
            told += ": " + " and ".join(filter(None, (difference.first, difference.second)))
        if difference.largest is not None and difference.mean is not None:
            told += f", at most {difference.largest:.3g}, mean {difference.mean:.3g}"
        print(f"{_printable(difference.name)}  {told}")
    if not options.json:
        print(f"{found} tensors differ" if found else "the same")
    return FAILED if found else DONE


def _schema(options: argparse.Namespace) -> int:
    print(json.dumps(recipe_schema(), indent=2))
    return DONE


def _clean(options: argparse.Namespace) -> int:
    from .checkpoint.publish import clean

    for left in clean(options.directory, remove=not options.dry_run):
        if left.alive:
            what = "kept, a run is writing it"
        elif left.holds_output:
            what = "kept, a whole output that was being replaced; move it to where it belongs"
        else:
            what = "left by a killed run" if options.dry_run else "removed"
        print(f"{left.path}: {what} ({left.nbytes / 1e6:.3g} MB)")
    return DONE


def _demo(options: argparse.Namespace) -> int:
    from .demo import run_demo

    run_demo(seed=options.seed, keep=options.keep)
    return DONE


def _backends(options: argparse.Namespace) -> int:
    from .backends.registry import backends

    for backend in backends().values():
        print(f"{backend.name:8} {'available' if backend.available else 'not available: ' + backend.reason}")
        for key, value in backend.details.items():
            print(f"         {key}: {value}")
    return DONE


def _mergekit(options: argparse.Namespace) -> int:
    try:
        from .integrations.mergekit import run_yaml
    except ModuleNotFoundError as error:
        if error.name != "mergekit":
            raise
        raise ArgumentError("mergekit is not installed: pip install 'freemerge[mergekit]'") from None
    return run_yaml(options.arguments)


def _print_inspection(inspection: Inspection) -> None:
    width = max((len(decision.name) for decision in inspection.decisions), default=4)
    for decision in inspection.decisions:
        shape = "x".join(map(str, decision.shape)) or "scalar"
        line = f"{_printable(decision.name):{width}}  {shape:>14}  {decision.dtype:8}  {decision.action:6}"
        if decision.removed is not None:
            line += f"  removes {decision.removed:6.2%}  {decision.backend}: {decision.form}"
        if decision.stacked_with:
            line += f"  stacked: {', '.join(decision.stacked_with)}"
        print(line)
    actions = [decision.action for decision in inspection.decisions]
    print(
        f"{actions.count('filter')} tensors filtered, {actions.count('merge')} merged unfiltered, "
        f"{actions.count('copy')} copied; {inspection.read_bytes / 1e9:.3g} GB to read in {inspection.passes} "
        f"pass{'es' if inspection.passes > 1 else ''}, {inspection.write_bytes / 1e9:.3g} GB to write"
    )
    if inspection.seconds is not None:
        print(
            f"needs {inspection.memory_bytes / 1e9:.2g} GB of memory beside the system's cache, "
            f"{inspection.write_bytes / 1e9:.3g} GB of disk, and about {_duration(inspection.seconds)} where the disk "
            "keeps up"
        )
    _print_warnings(inspection)


def _duration(seconds: float) -> str:
    return f"{seconds:.2g} s" if seconds < 99.5 else f"{seconds / 60:.0f} min"


def _print_report(report: Report, recipe: Recipe) -> None:
    weights = "per tensor" if report.weights is None else ", ".join(f"{weight:.4f}" for weight in report.weights)
    found = f"weights {weights}; " if recipe.method.weights is not None else ""
    print(f"{report.out}: {found}scale {report.scale:g}")


def _print_stages(report: Report) -> None:
    for stage in report.stages:
        print(f"  {stage}", file=sys.stderr)


def _print_warnings(inspection: Inspection) -> None:
    for warning in inspection.warnings:
        print(f"warning: {_printable(warning)}", file=sys.stderr)


def _printable(text: object) -> str:
    """Without control characters, which names in files may hold."""
    return "".join(c if c.isprintable() or c == "\n" else repr(c)[1:-1] for c in str(text))


def _plain(value: Any) -> Any:
    """Dataclasses and paths as JSON types."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {f.name: _plain(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return str(value) if isinstance(value, Path) else value


def _tokenizer(text: str) -> str | int:
    if text in ("base", "auto"):
        return text
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"expected base, auto or the number of a model, got {text!r}")
    return int(text)


def _number(text: str, expected: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"expected {expected}, got {text!r}") from None


def _rule(text: str) -> tuple[str, str]:
    pattern, separator, action = text.rpartition("=")
    if not separator or action not in get_args(Action):
        actions = ", ".join(get_args(Action))
        raise argparse.ArgumentTypeError(f"expected PATTERN=ACTION with one of {actions}, got {text!r}")
    return pattern, action


def _renaming(text: str) -> tuple[str, str]:
    old, separator, new = text.partition("=")
    if not separator or old == new:
        raise argparse.ArgumentTypeError(f"expected OLD=NEW, two prefixes of which one may be empty, got {text!r}")
    return old, new


def _size(text: str) -> int:
    number = text.upper()
    unit = next((unit for unit in _SIZES if number.endswith(unit)), "")
    try:
        return int(float(number.removesuffix(unit)) * _SIZES.get(unit, 1))
    except (ValueError, OverflowError):
        raise argparse.ArgumentTypeError(f"expected a size such as 500MB or 2GB, got {text!r}") from None
