"""Make Hugging Face causal language models shallower, inside the Trainer.

The public names are imported when they are first used, so that `import hf_layerprune` is light.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any


if TYPE_CHECKING:
    from .checkpoints.loading import last_checkpoint as last_checkpoint
    from .checkpoints.loading import load_model as load_model
    from .checkpoints.loading import load_pruned_adapter as load_pruned_adapter
    from .checkpoints.saving import save_adapter as save_adapter
    from .checkpoints.saving import save_model as save_model
    from .data import load_texts as load_texts
    from .data import make_batches as make_batches
    from .data import token_blocks as token_blocks
    from .distillation.arguments import DistillationTrainingArguments as DistillationTrainingArguments
    from .distillation.reconstruction import Reconstruction as Reconstruction
    from .distillation.reconstruction import reconstruct_layers as reconstruct_layers
    from .distillation.teacher_cache import write_teacher_outputs as write_teacher_outputs
    from .distillation.trainer import DistillationTrainer as DistillationTrainer
    from .errors import LayerPruneError as LayerPruneError
    from .evaluation.evaluate import HeldOutText as HeldOutText
    from .evaluation.evaluate import evaluate_model as evaluate_model
    from .evaluation.evaluate import evaluate_text as evaluate_text
    from .evaluation.evaluate import stability as stability
    from .evaluation.multiple_choice import MultipleChoice as MultipleChoice
    from .evaluation.multiple_choice import Question as Question
    from .pruning.callback import LayerPruningCallback as LayerPruningCallback
    from .pruning.replacement import replace_by_linear_map as replace_by_linear_map
    from .pruning.replacement import replace_run as replace_run
    from .scoring.score import rank_correlation as rank_correlation
    from .scoring.score import score_layers as score_layers
    from .scoring.search import select_layers as select_layers
    from .scoring.table import ScoreTable as ScoreTable
    from .surgery.inspection import inspect_layers as inspect_layers
    from .surgery.lineage import Lineage as Lineage
    from .surgery.lineage import get_lineage as get_lineage
    from .surgery.removal import remove_layers as remove_layers

_HOMES = {
    "DistillationTrainer": "distillation.trainer",
    "DistillationTrainingArguments": "distillation.arguments",
    "HeldOutText": "evaluation.evaluate",
    "LayerPruneError": "errors",
    "LayerPruningCallback": "pruning.callback",
    "Lineage": "surgery.lineage",
    "MultipleChoice": "evaluation.multiple_choice",
    "Question": "evaluation.multiple_choice",
    "ScoreTable": "scoring.table",
    "evaluate_model": "evaluation.evaluate",
    "evaluate_text": "evaluation.evaluate",
    "get_lineage": "surgery.lineage",
    "inspect_layers": "surgery.inspection",
    "last_checkpoint": "checkpoints.loading",
    "load_model": "checkpoints.loading",
    "load_pruned_adapter": "checkpoints.loading",
    "load_texts": "data",
    "make_batches": "data",
    "Reconstruction": "distillation.reconstruction",
    "rank_correlation": "scoring.score",
    "reconstruct_layers": "distillation.reconstruction",
    "remove_layers": "surgery.removal",
    "replace_by_linear_map": "pruning.replacement",
    "replace_run": "pruning.replacement",
    "save_adapter": "checkpoints.saving",
    "save_model": "checkpoints.saving",
    "score_layers": "scoring.score",
    "select_layers": "scoring.search",
    "stability": "evaluation.evaluate",
    "token_blocks": "data",
    "write_teacher_outputs": "distillation.teacher_cache",
}

__all__ = [*_HOMES]


def __dir__() -> list[str]:
    return [*__all__, "__version__"]


def __getattr__(name: str) -> Any:
    if name == "__version__":
        from importlib.metadata import version

        return version("hf-layerprune")
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f".{_HOMES[name]}", __name__), name)
