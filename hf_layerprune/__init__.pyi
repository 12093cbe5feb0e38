"""The public names, declared once: __init__.py reads them from here."""

from .checkpoints.loading import last_checkpoint as last_checkpoint
from .checkpoints.loading import load_model as load_model
from .checkpoints.loading import load_pruned_adapter as load_pruned_adapter
from .checkpoints.loading import load_tokenizer as load_tokenizer
from .checkpoints.saving import save_adapter as save_adapter
from .checkpoints.saving import save_model as save_model
from .data import load_texts as load_texts
from .data import make_batches as make_batches
from .data import split_blocks as split_blocks
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
from .evaluation.tasks import load_task as load_task
from .pruning.arguments import PruningArguments as PruningArguments
from .pruning.callback import LayerPruningCallback as LayerPruningCallback
from .pruning.prune import prune_layers as prune_layers
from .pruning.replacement import replace_by_linear_map as replace_by_linear_map
from .pruning.replacement import replace_run as replace_run
from .recipes.prune import PruneOutput as PruneOutput
from .recipes.prune import prune as prune
from .recipes.recipe import shipped_recipes as shipped_recipes
from .reports.record import read_record as read_record
from .scoring.score import rank_correlation as rank_correlation
from .scoring.score import score_layers as score_layers
from .scoring.search import select_layers as select_layers
from .scoring.table import ScoreTable as ScoreTable
from .surgery.inspection import inspect_layers as inspect_layers
from .surgery.lineage import Lineage as Lineage
from .surgery.lineage import get_lineage as get_lineage
from .surgery.removal import remove_layers as remove_layers

__version__: str
