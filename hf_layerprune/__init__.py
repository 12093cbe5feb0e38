"""Make Hugging Face causal language models shallower, inside the Trainer.

The public names are imported when they are first used, so that `import hf_layerprune` is light.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any


if TYPE_CHECKING:
    from .arguments import DistillationTrainingArguments as DistillationTrainingArguments
    from .callback import LayerPruningCallback as LayerPruningCallback
    from .checkpoint import last_checkpoint as last_checkpoint
    from .checkpoint import load_model as load_model
    from .checkpoint import load_pruned_adapter as load_pruned_adapter
    from .data import load_texts as load_texts
    from .data import make_batches as make_batches
    from .data import token_blocks as token_blocks
    from .errors import LayerPruneError as LayerPruneError
    from .evaluation import HeldOutText as HeldOutText
    from .evaluation import evaluate_model as evaluate_model
    from .evaluation import evaluate_text as evaluate_text
    from .evaluation import stability as stability
    from .inspection import inspect_layers as inspect_layers
    from .lineage import Lineage as Lineage
    from .lineage import get_lineage as get_lineage
    from .multiple_choice import MultipleChoice as MultipleChoice
    from .multiple_choice import Question as Question
    from .reconstruction import Reconstruction as Reconstruction
    from .reconstruction import reconstruct_layers as reconstruct_layers
    from .replacement import replace_by_linear_map as replace_by_linear_map
    from .replacement import replace_run as replace_run
    from .saving import save_adapter as save_adapter
    from .saving import save_model as save_model
    from .scoring import ScoreTable as ScoreTable
    from .scoring import rank_correlation as rank_correlation
    from .scoring import score_layers as score_layers
    from .search import select_layers as select_layers
    from .surgery import remove_layers as remove_layers
    from .teacher_outputs import write_teacher_outputs as write_teacher_outputs
    from .trainer import DistillationTrainer as DistillationTrainer

_HOMES = {
    "DistillationTrainer": "trainer",
    "DistillationTrainingArguments": "arguments",
    "HeldOutText": "evaluation",
    "LayerPruneError": "errors",
    "LayerPruningCallback": "callback",
    "Lineage": "lineage",
    "MultipleChoice": "multiple_choice",
    "Question": "multiple_choice",
    "ScoreTable": "scoring",
    "evaluate_model": "evaluation",
    "evaluate_text": "evaluation",
    "get_lineage": "lineage",
    "inspect_layers": "inspection",
    "last_checkpoint": "checkpoint",
    "load_model": "checkpoint",
    "load_pruned_adapter": "checkpoint",
    "load_texts": "data",
    "make_batches": "data",
    "Reconstruction": "reconstruction",
    "rank_correlation": "scoring",
    "reconstruct_layers": "reconstruction",
    "remove_layers": "surgery",
    "replace_by_linear_map": "replacement",
    "replace_run": "replacement",
    "save_adapter": "saving",
    "save_model": "saving",
    "score_layers": "scoring",
    "select_layers": "search",
    "stability": "evaluation",
    "token_blocks": "data",
    "write_teacher_outputs": "teacher_outputs",
}

__all__ = [*_HOMES]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f".{_HOMES[name]}", __name__), name)
