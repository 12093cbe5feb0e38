"""Settings of token sequences and batches for training arguments, recipes and commands.

This module imports no other module of the package.
"""

from dataclasses import dataclass, field


PACKINGS = ("joined", "packed", "none")
LOSSES = ("all", "completion")


@dataclass
class SequenceArguments:
    """Settings that control how text becomes token sequences, see [`prepare_dataset`].

    Args:
        sequence_length (`int`, *optional*): number of tokens in a sequence. Default: the context length of
            the model, at most 1024.
        packing (`str`, *optional*, defaults to `"joined"`): `"joined"`, `"packed"` or `"none"`.
        loss_on (`str`, *optional*, defaults to `"all"`): `"all"` or `"completion"`.
    """

    sequence_length: int | None = field(
        default=None,
        metadata={"help": "Tokens in a sequence. Default: context length, at most 1024."},
    )
    packing: str = field(
        default="joined",
        metadata={
            "help": "How texts become sequences. joined: joined and cut into equal sequences; packed: "
            "whole texts, which do not attend to each other; none: one sequence for each text.",
            "choices": list(PACKINGS),
        },
    )
    loss_on: str = field(
        default="all",
        metadata={
            "help": "Tokens that count in the loss. completion: those of assistant turns and completions.",
            "choices": list(LOSSES),
        },
    )


@dataclass(kw_only=True)
class BatchArguments:
    """Settings of the batch size outside training.

    Args:
        batch_tokens (`int`, *optional*): number of tokens in a forward pass of scoring, evaluation and
            caching. Default on a GPU: the number that fits into half of the free memory, at most 32,768.
            Default on a CPU: a few sequences.
    """

    batch_tokens: int | None = field(
        default=None,
        metadata={
            "help": "Tokens in a forward pass of scoring, evaluation and caching. Default: as many as fit "
            "into half of the free GPU memory, at most 32,768; on a CPU a few sequences."
        },
    )
