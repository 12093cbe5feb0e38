"""The command line: parse, call the library, print."""

import json
import logging
import os
import signal
import sys
from collections import Counter
from collections.abc import Callable
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

from ..errors import LayerPruneError
from .flags import (
    CardArguments,
    CriterionArguments,
    EvaluateArguments,
    InspectArguments,
    ModelArguments,
    OptionalTextArguments,
    PhaseArguments,
    PruneArguments,
    PruneOutput,
    ScoreArguments,
    SizeArguments,
    TeachArguments,
    TextArguments,
    name_flags,
)


_flags: list[str] = []  # of the command that runs
INTERRUPTED = 128 + signal.SIGINT  # the exit code of a process that Ctrl-C ended


def inspect(arguments: list[str]) -> None:
    """List the layers of MODEL and which can be removed, from its config alone."""
    name, source, output = _parse("inspect", arguments, [ModelArguments, InspectArguments])
    from ..checkpoints.loading import load_skeleton
    from ..reports.card import markdown_table
    from ..surgery.inspection import inspect_layers

    _check_folder_of(output.json)
    found = inspect_layers(load_skeleton(name, source.trust_remote_code))
    rows = [["layer", "original", "kind", "parameters", "can go"]]
    for layer in found.layers:
        parameters = f"{layer.parameters / 1e6:.2f}M"
        can_go = "no" if layer.refused else "yes"
        rows.append([str(layer.layer), str(layer.original), layer.kind, parameters, can_go])
    print(markdown_table(rows))
    print(f"\n{found.model_type}: {len(found.layers)} of {found.original_layers} layers, ", end="")
    print(f"{found.parameters / 1e6:.1f}M parameters. The ends are protected unless --protected says else.")
    for layer in found.layers:
        if layer.refused:
            print(f"\n{layer.refused}")
    if output.json:
        _write_json(output.json, found.to_dict())


def score(arguments: list[str]) -> None:
    """Score how much each layer of MODEL matters."""
    types = [ModelArguments, TextArguments, CriterionArguments, ScoreArguments]
    name, source, text, how, output = _parse("score", arguments, types)
    from ..data import make_batches
    from ..scoring.score import check_plot_path, rank_correlation, read_table, score_layers

    if output.plot:
        check_plot_path(output.plot)
    _check_folder_of(output.json)
    is_table = output.compare is not None and output.compare.endswith(".json")
    other = read_table(output.compare) if is_table else None
    config, tokenizer = _check_model(name, source, "score", how.criterion)
    texts = [text] if is_table or not output.compare else [text, replace(text, data=output.compare)]
    blocks = [_blocks(one, config, tokenizer, how.calibration_blocks) for one in texts]
    model = _load_model(name, source)

    def table_of(blocks: Any, journal: str | None = None) -> Any:
        settings = {"run": output.run, "racing": how.racing, "protected": how.protected}
        return score_layers(model, make_batches(blocks, 4), how.criterion, journal=journal, **settings)

    table = table_of(blocks[0], output.json and output.json + ".part")
    if output.plot:
        table.plot(output.plot)
    if output.json:
        _write_json(output.json, table.to_dict())
    for layer in table.ranking():
        line = f"layer {layer:3d}   {how.criterion} {table.scores[layer]:9.5f}"
        error = table.errors.get(layer)
        print(line if error is None else f"{line} +- {error:.5f}")
    if output.compare:
        other = other or table_of(blocks[1])
        if other.run != table.run:
            raise LayerPruneError(f"{output.compare} scores runs of {other.run} layers, not of {table.run}.")
        few = max(1, len(table.scores) // 4)
        least = [{one.kept[layer] for layer in one.ranking()[:few]} for one in (table, other)]
        print(f"\nCompared with {output.compare}: rank correlation {rank_correlation(table, other):.3f};")
        print(f"of the {few} least important layers of each, {len(least[0] & least[1])} are the same.")


def prune(arguments: list[str]) -> None:
    """Remove the least important layers of MODEL one by one, without training."""
    types = [ModelArguments, TextArguments, CriterionArguments, PruneArguments, PruneOutput]
    name, source, text, how, what, output = _parse("prune", arguments, types)
    from ..checkpoints.loading import copy_companions
    from ..checkpoints.saving import save_model
    from ..data import split_blocks
    from ..evaluation.evaluate import HeldOutText
    from ..pruning.prune import prune_layers
    from ..reports.card import markdown_table, table_rows, write_card
    from ..reports.record import check_folder_is_free, write_record
    from ..surgery.decoder import predicts_next_token

    check_folder_is_free(output.output_dir)
    config, tokenizer = _check_model(name, source, "prune", how.criterion)
    blocks = _blocks(text, config, tokenizer, how.calibration_blocks + what.heldout_blocks)
    calibration, heldout, _ = split_blocks(blocks, how.calibration_blocks, what.heldout_blocks)
    model = _load_model(name, source)
    record = prune_layers(
        model,
        target_layers=what.target_layers,
        criterion=how.criterion,
        racing=how.racing,
        calibration=calibration,
        protected=how.protected,
        # What else there is has no perplexity.
        evaluation=HeldOutText(heldout) if predicts_next_token(model) else None,
    )
    save_model(model, output.output_dir, verify=output.verify_save, legacy_rope=output.legacy_rope)
    tokenizer.save_pretrained(output.output_dir)
    copy_companions(name, output.output_dir)
    write_record(record, output.output_dir)
    write_card(record.to_dict(), Path(output.output_dir))
    print(markdown_table(table_rows(record.to_dict())))
    advice = "train it on your task" if record.dense is None else "`hf-layerprune distill` does both"
    print(f"\nSaved in {output.output_dir}. It was not healed: {advice}.")


def teach(arguments: list[str]) -> None:
    """Write what MODEL says of a text, for `distill --teacher` without it."""
    types = [ModelArguments, TextArguments, TeachArguments]
    name, source, text, output = _parse("teach", arguments, types)
    from ..data import make_batches
    from ..distillation.teacher_cache import TeacherOutputs, write_teacher_outputs

    config, tokenizer = _check_model(name, source, "teach")
    batches = make_batches(_blocks(text, config, tokenizer), output.batch_size)
    model = _load_model(name, source)
    settings = {"temperature": output.temperature, "hidden_layers": output.hidden_layers}
    write_teacher_outputs(model, batches, output.output_dir, output.top_k, **settings)
    size = sum(file.stat().st_size for file in Path(output.output_dir).iterdir()) / 2**20
    rows = len(TeacherOutputs(output.output_dir).keys)
    print(f"{output.output_dir}: {rows} blocks, {size:.1f} MB. `hf-layerprune distill --teacher` reads them.")


def distill(arguments: list[str]) -> None:
    """Remove layers of MODEL while the original teaches what is left (2511.05085)."""
    from ..checkpoints.loading import copy_companions
    from ..distillation.arguments import DistillationTrainingArguments
    from ..distillation.trainer import DistillationTrainer
    from ..evaluation.evaluate import HeldOutText
    from ..pruning.callback import LayerPruningCallback
    from ..reports.card import markdown_table, table_rows
    from ..reports.record import check_folder_is_free

    types = [
        ModelArguments,
        TextArguments,
        CriterionArguments,
        PruneArguments,
        SizeArguments,
        PhaseArguments,
        DistillationTrainingArguments,
    ]
    name, source, text, how, what, size, phases, args = _parse("distill", arguments, types)
    resume = True if phases.resume or args.resume_from_checkpoint == "True" else args.resume_from_checkpoint
    _check_reporters(args.report_to)
    if not resume:
        check_folder_is_free(args.output_dir, resume="--resume")
    _keep_dtype(args, name, source)
    config, tokenizer = _check_model(name, source, "distill")
    sizes = how.calibration_blocks, what.heldout_blocks
    calibration, heldout, train = _parts(text, config, tokenizer, *sizes, args)
    if not text.streaming and not len(train):
        raise LayerPruneError(
            f"Calibration and evaluation take all {sum(sizes)} blocks of the text, none is left to "
            "train on: give more text, or ask for fewer blocks."
        )
    model = _load_model(name, source, dtype="float32")
    evaluation = HeldOutText(heldout, args.per_device_eval_batch_size)
    pruning = LayerPruningCallback(
        target_layers=what.target_layers,
        criterion=how.criterion,
        racing=how.racing,
        calibration=calibration,
        layers_per_phase=size.layers_per_phase,
        steps_per_phase=phases.steps_per_phase,
        tokens_per_phase=phases.tokens_per_phase,
        restart_learning_rate=phases.restart_learning_rate,
        protected=how.protected,
        quality_floor=phases.quality_floor,
        min_recovery=phases.min_recovery,
        evaluation=evaluation,
    )
    lora = None
    if phases.lora_rank is not None:
        from peft import LoraConfig

        lora = LoraConfig(r=phases.lora_rank, target_modules="all-linear")
    try:
        trainer = DistillationTrainer(
            model=model,
            args=args,
            teacher_model=phases.teacher,
            trust_remote_code=source.trust_remote_code,
            train_dataset=train,
            eval_dataset=heldout,
            processing_class=tokenizer,
            peft_config=lora,
            callbacks=[pruning],
        )
    except ValueError as error:  # the Trainer refused an argument
        raise LayerPruneError(str(error)) from error
    trainer.train(resume_from_checkpoint=resume)
    trainer.save_model()
    copy_companions(name, args.output_dir)
    trainer.create_model_card()
    print(markdown_table(table_rows(pruning.record.to_dict())))
    print(f"\nSaved in {args.output_dir}.")


def phases(arguments: list[str]) -> None:
    """Remove layers of MODEL phase by phase, each trained by a COMMAND of its own: ... -- COMMAND."""
    at = arguments.index("--") if "--" in arguments else len(arguments)
    arguments, command = arguments[:at], arguments[at + 1 :]
    types = [ModelArguments, TextArguments, CriterionArguments, PruneArguments, SizeArguments, PruneOutput]
    name, source, text, how, what, size, output = _parse("phases", arguments, types)
    from ..checkpoints.loading import copy_companions, stored_dtype
    from ..checkpoints.saving import save_model
    from ..data import split_blocks
    from ..evaluation.evaluate import HeldOutText
    from ..pruning.command_phases import run_phases
    from ..reports.card import markdown_table, table_rows, write_card

    config, tokenizer = _check_model(name, source, "phases")
    blocks = _blocks(text, config, tokenizer, how.calibration_blocks + what.heldout_blocks)
    calibration, heldout, _ = split_blocks(blocks, how.calibration_blocks, what.heldout_blocks)

    def load(folder: str | None) -> Any:
        return _load_model(folder or name, source)

    record = run_phases(
        load,
        command,
        output.output_dir,
        target_layers=what.target_layers,
        layers_per_phase=size.layers_per_phase,
        criterion=how.criterion,
        racing=how.racing,
        calibration=calibration,
        protected=how.protected,
        evaluation=HeldOutText(heldout),
    )
    last = Path(output.output_dir) / f"phase_{len(record.phases)}" / "healed"
    settings = {"legacy_rope": output.legacy_rope, "dtype": stored_dtype(name, source.trust_remote_code)}
    save_model(load(str(last)), output.output_dir, verify=output.verify_save, **settings)
    tokenizer.save_pretrained(output.output_dir)
    copy_companions(name, output.output_dir)
    write_card(record.to_dict(), Path(output.output_dir))
    print(markdown_table(table_rows(record.to_dict())))
    print(f"\nSaved in {output.output_dir}; what each phase left is in its folder there.")


def run(arguments: list[str]) -> None:
    """A published method by its RECIPE: a name such as shortgpt, or a YAML file; flags change its fields."""
    import torch

    from ..checkpoints.loading import copy_companions
    from ..distillation.arguments import DistillationTrainingArguments
    from ..pruning.schedule import phase_sizes
    from ..recipes.recipe import RecipeArguments, recipe_words, resolved_fields, run_recipe, shipped_recipes
    from ..reports.card import markdown_table, table_rows
    from ..reports.record import check_folder_is_free
    from ..surgery.decoder import layer_count, text_config

    types = [
        RecipeArguments,
        ModelArguments,
        TextArguments,
        CriterionArguments,
        SizeArguments,
        PhaseArguments,
        DistillationTrainingArguments,
    ]
    if "--method" in arguments:  # the same, wherever it stands
        at = arguments.index("--method")
        arguments = [*arguments[at + 1 : at + 2], *arguments[:at], *arguments[at + 2 :]]
    if not arguments or arguments[0].startswith("-"):
        if not set(arguments) & {"-h", "--help"}:
            raise LayerPruneError(f"Give a YAML file, or one of {', '.join(shipped_recipes())}.")
        words = arguments
    else:
        on_cpu = [] if torch.cuda.is_available() else ["--use_cpu", "True"]  # bf16 wants to hear it
        words = on_cpu + recipe_words(arguments[0], types) + arguments[1:]
    recipe, source, text, how, size, phases, args = _parse("run", words, types, model=False)
    resume = True if phases.resume or args.resume_from_checkpoint == "True" else args.resume_from_checkpoint
    idle = {name: getattr(phases, name) for name in ("teacher", "lora_rank")}  # which distill knows
    if recipe.select != "phases":
        idle |= vars(phases) | {"resume": False, "layers_per_phase": size.layers_per_phase - 1}
    idle = {name: value for name, value in idle.items() if value}
    if idle:
        raise LayerPruneError(
            f"run has no use for {', '.join(f'--{name}' for name in idle)} with --select {recipe.select}: "
            "leave it out."
        )
    _check_reporters(args.report_to)
    if not resume:
        check_folder_is_free(args.output_dir, resume="--resume")
    _keep_dtype(args, recipe.model, source)
    config, tokenizer = _check_model(recipe.model, source, "run")
    if recipe.select == "phases" and args.max_steps < 0 and phases.steps_per_phase:
        count = layer_count(text_config(config))
        args.max_steps = phases.steps_per_phase * len(phase_sizes(count, recipe.keep, size.layers_per_phase))
    sizes = how.calibration_blocks, recipe.heldout_blocks
    calibration, heldout, train = _parts(text, config, tokenizer, *sizes, args)
    model = _load_model(recipe.model, source, dtype="float32")
    names = ("steps_per_phase", "tokens_per_phase", "restart_learning_rate", "quality_floor", "min_recovery")
    record = run_recipe(
        model,
        tokenizer,
        recipe,
        args,
        calibration=calibration,
        heldout=heldout,
        train=train,
        criterion=how.criterion,
        racing=how.racing,
        protected=how.protected,
        phases={name: getattr(phases, name) for name in names} | {"layers_per_phase": size.layers_per_phase},
        resume=resume,
        resolved=resolved_fields([recipe, text, how, size, phases], args),
    )
    copy_companions(recipe.model, args.output_dir)
    print(markdown_table(table_rows(record)))
    print(f"\nSaved in {args.output_dir}.")


def evaluate(arguments: list[str]) -> None:
    """What one or more MODELs can do on a text and in tasks, side by side; the first is the dense one."""
    types = [ModelArguments, OptionalTextArguments, EvaluateArguments]
    names, source, text, output = _parse("evaluate", arguments, types, several=True)
    from ..data import make_batches
    from ..evaluation.evaluate import compare_models, evaluate_model
    from ..evaluation.tasks import load_task, split_name
    from ..reports.card import evaluation_rows, markdown_table
    from ..scoring.score import fingerprint

    _check_folder_of(output.json)
    if text.data is None and not output.tasks:
        raise LayerPruneError("There is nothing to measure: give a text with --data, or --tasks, or both.")
    if output.limit is not None and output.limit < 2:
        raise LayerPruneError(f"limit is {output.limit}: it must be at least 2.")
    questions = {}
    twice = [name for name, times in Counter(map(_task_name, output.tasks)).items() if times > 1]
    if twice:
        raise LayerPruneError(f"tasks has {twice[0]} more than once: put all its rows into one file.")
    if output.lm_eval and output.tasks:
        from ..evaluation.lm_eval import known_tasks

        known_tasks(output.tasks)
    else:
        questions = {split_name(task)[0]: load_task(task, output.limit) for task in output.tasks}
    tokenizers, blocks = {}, {}
    for name in names:  # a wrong name and a wrong text are found before the long work
        config, tokenizers[name] = _check_model(name, source, "evaluate")
        if text.data is not None:
            blocks[name] = _blocks(text, config, tokenizers[name], output.max_blocks)
    there = output.json and Path(output.json).exists() and not output.lm_eval  # which reads files of its own
    earlier = _read_json(output.json or "")["models"] if there else {}
    results: dict[str, dict[str, Any]] = {}
    read = None if text.data is None else Path(text.data).name
    for name in names:
        model, tokenizer = _load_model(name, source, output.dtype), tokenizers[name]
        batches = make_batches(blocks[name], 4) if name in blocks else []
        mark = fingerprint([model], batches, [output.lm_eval, output.limit, output.tasks, questions])
        known = next((found for found in earlier.values() if found.get("fingerprint") == mark), None)
        results[name] = known or evaluate_model(model, tokenizer, batches, questions)
        if output.lm_eval and output.tasks and not known:
            from ..evaluation.lm_eval import read_through_harness

            results[name] |= read_through_harness(model, tokenizer, output.tasks, output.limit)
        results[name]["fingerprint"] = mark
        if Path(name).is_dir():
            size = sum(file.stat().st_size for file in Path(name).glob("*.safetensors"))
            results[name]["file_mb"] = round(size / 2**20, 1)
        if output.json:
            _write_json(output.json, {"text": read, "models": earlier | results})
    compare_models(results)
    for task, _, file in (task.partition("=") for task in output.tasks):
        for found in results.values():
            if task in found["tasks"]:  # of a group, lm-eval names the members
                found["tasks"][task]["source"] = "/".join(Path(file).parts[-2:]) or None
    print(markdown_table(evaluation_rows(results)))
    if output.json:
        _write_json(output.json, {"text": read, "models": results})


def card(arguments: list[str]) -> None:
    """Write the card of the run in folder MODEL anew; with --evaluation, also what it can do."""
    folder, output = _parse("card", arguments, [CardArguments])
    from ..reports.card import write_card
    from ..reports.record import read_record, write_record

    record = read_record(folder)
    if record is None:
        raise LayerPruneError(f"{folder} holds no layer_pruning.json: give the folder of a run.")
    if output.base_model:
        record.model["name"] = output.base_model
    if output.evaluation:
        record.evaluation = _evaluation_of(folder, output)
    write_record(record, folder)
    names = {"license": output.license, "dataset": output.datasets, "language": output.language}
    write_card(record.to_dict(), Path(folder), output.repository, **names)
    print(f"{Path(folder) / 'README.md'}")


def _evaluation_of(folder: str, output: CardArguments) -> dict[str, Any]:
    """What `evaluate --json` found of the dense model, its first, and of that in `folder`, in short."""
    results = _read_json(output.evaluation or "")
    (first, dense), *others = results["models"].items()
    name = Path(folder).resolve().name
    same = [pair for pair in others if Path(pair[0]).name == name]
    here = [pair for pair in same if len(same) == 1 or Path(pair[0]).resolve() == Path(folder).resolve()]
    found = here[0][1] if here else None
    if found is None:
        names = ", ".join(Path(other).name for other, _ in others) or f"{Path(first).name} alone"
        raise LayerPruneError(
            f"{output.evaluation} is of {names}, not of {name}: evaluate the dense model first, and this one."
        )
    if "tasks" in found and "difference" not in found:
        raise LayerPruneError(f"{output.evaluation} was not finished: call evaluate again, which goes on.")
    for one in (dense, found):
        for task in one.get("tasks", {}).values():
            task.pop("perplexities", None)
    return {"text": results["text"], "dense": dense, "model": found}


def _read_json(path: str) -> dict[str, Any]:
    """What `evaluate --json` wrote."""
    try:
        found = json.loads(Path(path).read_text(encoding="utf-8"))
        models = dict(found["models"])
        if not models:
            raise ValueError("no models")
        return {"text": found["text"], "models": models}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise LayerPruneError(f"{path} is not from evaluate --json: {error!r}") from error


def study(arguments: list[str]) -> None:
    """Answer one question by a grid of small runs: NAME is baseline, losses, iterative, criteria, ..."""
    from ..reports.card import markdown_table
    from .studies import STUDIES, StudyArguments, run_study, study_rows

    name = arguments[0] if arguments and not arguments[0].startswith("-") else ""
    (settings,) = _parse("study", arguments[bool(name) :], [StudyArguments], model=False)
    if name not in STUDIES:
        raise LayerPruneError(f"Give the name of a study: {', '.join(STUDIES)}.")
    print(f"{STUDIES[name].__doc__}\n")
    print(markdown_table(study_rows(run_study(name, settings))))
    print(f"\nTable, plot and numbers are in {settings.output_dir or f'study-{name}'}.")


def quickstart(arguments: list[str]) -> None:
    """Take SmolLM2-135M from 30 to 27 layers on this machine, without a hub or an account."""
    from .quickstart import QuickstartArguments
    from .quickstart import quickstart as run

    (settings,) = _parse("quickstart", arguments, [QuickstartArguments], model=False)
    run(settings)


COMMANDS: dict[str, Callable[[list[str]], None]] = {
    "quickstart": quickstart,
    "inspect": inspect,
    "score": score,
    "prune": prune,
    "teach": teach,
    "distill": distill,
    "phases": phases,
    "run": run,
    "evaluate": evaluate,
    "study": study,
    "card": card,
}


def main(arguments: list[str] | None = None) -> int:
    """Run one command; return the exit code: 0, 2 after a mistake of the user's, 130 after Ctrl-C."""
    command, *rest = (sys.argv[1:] if arguments is None else arguments) or ["--help"]
    if command in ("-h", "--help"):
        print("usage: hf-layerprune COMMAND ...   (hf-layerprune COMMAND --help for its flags)\n")
        for name, function in COMMANDS.items():
            print(f"  {name:12s}{function.__doc__}")
        return 0
    from tqdm.contrib.logging import logging_redirect_tqdm

    handler = logging.StreamHandler()
    handler.setFormatter(_FlagNames("%(message)s"))
    logging.basicConfig(handlers=[handler])
    _flags.clear()
    logging.getLogger("hf_layerprune").setLevel(logging.INFO)
    try:
        if command not in COMMANDS:
            raise LayerPruneError(f"no command {command!r}: choose from {', '.join(COMMANDS)}")
        with logging_redirect_tqdm():
            COMMANDS[command](rest)
    except BrokenPipeError:  # the reader of our output has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except LayerPruneError as error:
        print(f"hf-layerprune: error: {name_flags(str(error), _flags)}", file=sys.stderr)
        return 2
    except (OSError, ImportError) as error:
        # A file that cannot be written and a package that is missing are the user's to mend, too.
        print(f"hf-layerprune: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"\nhf-layerprune: interrupted. {_how_to_go_on(command, rest)}", file=sys.stderr)
        return INTERRUPTED
    return 0


class _FlagNames(logging.Formatter):
    """Names flags in what the library logs, as in its errors."""

    def format(self, record: logging.LogRecord) -> str:
        message = super().format(record)
        return name_flags(message, _flags) if record.name.startswith("hf_layerprune") else message


def _how_to_go_on(command: str, arguments: list[str]) -> str:
    """What to do after Ctrl-C, in one sentence."""
    from argparse import ArgumentParser

    parser = ArgumentParser(add_help=False)
    parser.add_argument("--output_dir", "--output-dir", default="trainer_output")  # the Trainer's default
    parser.add_argument("--json")
    given = parser.parse_known_args(arguments)[0]
    if command in ("distill", "run"):
        from ..checkpoints.loading import last_checkpoint

        found = last_checkpoint(given.output_dir)
        if found:
            return f"Its last checkpoint is {found}: add --resume to the command to go on from there."
        return (
            "It wrote no checkpoint: give the command again to start anew, with --save_steps to resume later."
        )
    if command in ("phases", "teach", "study") or (command in ("score", "evaluate") and given.json):
        return "Give the command again to go on."
    if command in ("score", "evaluate"):
        return "Nothing was kept: give the command again, with --json FILE to go on after a stop."
    return "Nothing was kept: give the command again to start anew."


def _parse(
    command: str, arguments: list[str], types: list[Any], model: bool = True, several: bool = False
) -> list[Any]:
    """The model name or names, and one filled dataclass for each of `types`."""
    from transformers import HfArgumentParser

    class Parser(HfArgumentParser):
        def error(self, message: str) -> Any:
            raise LayerPruneError(f"{message} (see hf-layerprune {command} --help)")

    _flags[:] = [one.name for kind in types for one in fields(kind) if one.init]
    parser = Parser(types, prog=f"hf-layerprune {command}", description=COMMANDS[command].__doc__)
    if model:
        words = "+" if several else None
        parser.add_argument("model", nargs=words, help="folder or hub id of the model")
    try:
        *parsed, rest = parser.parse_args_into_dataclasses(arguments)
    except ValueError as error:  # a dataclass refused a value
        raise LayerPruneError(str(error)) from error
    return [rest.model, *parsed] if model else [*parsed, rest][: len(types)]


def _check_model(
    name: str, source: ModelArguments, command: str, criterion: str | None = None
) -> tuple[Any, Any]:
    """The config and the tokenizer of a model of which no weights are loaded yet.

    Raises:
        LayerPruneError: there is none, or `command`, with this criterion, cannot use a model of its kind.
    """
    from ..checkpoints.loading import load_class, load_tokenizer
    from ..scoring.score import check_criterion_fits
    from ..surgery.decoder import check_next_token

    config, cls = load_class(name, source.trust_remote_code)
    if criterion is None:
        check_next_token(cls, command)
    else:
        check_criterion_fits(cls, criterion)
    return config, load_tokenizer(name, source.trust_remote_code)


def _keep_dtype(args: Any, name: str, source: ModelArguments) -> None:
    """Let what is trained in float32 be saved in the dtype that it was stored in, unless asked otherwise."""
    from ..checkpoints.loading import stored_dtype
    from ..distillation.arguments import DTYPES

    dtype = str(stored_dtype(name, source.trust_remote_code)).removeprefix("torch.")
    if args.save_dtype is None and dtype in DTYPES and dtype != "float32":
        args.save_dtype = dtype


def _load_model(name: str, source: ModelArguments, dtype: str = "auto") -> Any:
    import torch

    from ..checkpoints.loading import load_model

    model: Any = load_model(name, dtype=dtype, trust_remote_code=source.trust_remote_code)
    return model.to("cuda" if torch.cuda.is_available() else "cpu")


def _blocks(text: TextArguments, config: Any, tokenizer: Any, limit: int | None = None) -> Any:
    from ..data import check_block_length, load_texts, token_blocks

    check_block_length(text.block_length, config)
    texts = load_texts(text.data, text.data_field, text.data_split, text.data_config)
    blocks = token_blocks(texts, tokenizer, text.block_length, limit)
    blocks.info.dataset_name = _text_name(text)
    return blocks


def _text_name(text: TextArguments) -> str:
    """What a card calls a text: the name of its file, or its id and configuration on the hub."""
    if Path(text.data).exists():
        return Path(text.data).name
    return f"{text.data}, {text.data_config}" if text.data_config else text.data


def _parts(
    text: TextArguments, config: Any, tokenizer: Any, calibration: int, heldout: int, args: Any
) -> tuple[Any, Any, Any]:
    """Blocks to score on, to measure on, and to train on."""
    from ..data import check_block_length, split_blocks, stream_blocks

    if not text.streaming:
        return split_blocks(_blocks(text, config, tokenizer), calibration, heldout)
    if args.max_steps < 0:
        raise LayerPruneError("A stream has no known end: say how long to train with max_steps.")
    if args.max_steps == 0:
        return split_blocks(_blocks(text, config, tokenizer, calibration + heldout), calibration, heldout)
    check_block_length(text.block_length, config)
    source = (text.data, text.data_field, text.data_split, text.data_config)
    head, train = stream_blocks(tokenizer, text.block_length, calibration + heldout, *source)
    head.info.dataset_name = train.info.dataset_name = _text_name(text)
    return *split_blocks(head, calibration, heldout)[:2], train


def _check_reporters(report_to: str | list[str]) -> None:
    """Check, before any long work, that what shall show the logs is known and installed."""
    from transformers.integrations import get_reporting_integration_callbacks

    try:
        for reporter in get_reporting_integration_callbacks(report_to):
            reporter()
    except (ImportError, RuntimeError, ValueError) as error:
        raise LayerPruneError(f"--report_to {' '.join(_listed(report_to))}: {error}") from error


def _listed(value: str | list[str]) -> list[str]:
    return [value] if isinstance(value, str) else value


def _task_name(task: str) -> str:
    return task.partition("=")[0]


def _check_folder_of(path: str | None) -> None:
    if path is not None and not Path(path).absolute().parent.is_dir():
        raise LayerPruneError(f"Cannot write {path}: its folder does not exist.")


def _write_json(path: str, values: Any) -> None:
    Path(path).write_text(json.dumps(values, indent=1), encoding="utf-8")
