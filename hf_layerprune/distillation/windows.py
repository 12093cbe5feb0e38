"""Finds the windows of layers around each cut that reconstruction trains."""

from collections.abc import Collection
from dataclasses import dataclass

from ..errors import LayerPruneError
from ..surgery.lineage import Lineage


@dataclass(frozen=True)
class Window:
    """Consecutive layers that are trained together.

    Args:
        first, last (`int`): the first and the last of these layers, as present indices of the student.
        teacher_first, teacher_last (`int`): the teacher layers that give the window's input and target
            output, as present indices of the teacher.
    """

    first: int
    last: int
    teacher_first: int
    teacher_last: int


def find_windows(
    student: Lineage, teacher: Lineage, before: int, after: int, removed: Collection[int] | None = None
) -> list[Window]:
    """Returns the layers to train around each cut, as windows that do not overlap.

    Args:
        student, teacher ([`Lineage`]): the layers of both models.
        before, after (`int`): number of layers before and after each cut.
        removed (collection of `int`, *optional*): use only the cuts that removed one of these layers, given
            as original indices. Default: all cuts.

    Raises:
        LayerPruneError: the student has no cut relative to the teacher, or the teacher lacks a layer of the
            student.
    """
    if before < 0 or after < 0 or before + after < 1:
        raise LayerPruneError(
            f"layers_before is {before} and layers_after is {after}. Choose numbers of at least 0, and at "
            "least one layer in all."
        )
    check_teacher_has_layers(student, teacher)
    places = [teacher.kept.index(layer) for layer in student.kept]
    count = len(places)
    ends = [-1, *places, len(teacher.kept)]
    cuts = [i for i in range(count + 1) if ends[i + 1] != ends[i] + 1]  # in front of this student layer
    if removed is not None:
        gaps = {cut: teacher.kept[ends[cut] + 1 : ends[cut + 1]] for cut in cuts}
        cuts = [cut for cut, layers in gaps.items() if set(layers) & set(removed)]
    spans: list[list[int]] = []
    for cut in cuts:
        span = [max(0, cut - before), min(count, cut + after) - 1]
        if span[0] > span[1]:
            continue
        if spans and span[0] <= spans[-1][1]:
            spans[-1][1] = span[1]
        else:
            spans.append(span)
    if not spans:
        raise LayerPruneError(
            "No layer was removed from the model, so there is no cut to reconstruct. Remove layers first."
        )
    return [Window(first, last, places[first], places[last]) for first, last in spans]


def check_teacher_has_layers(student: Lineage, teacher: Lineage) -> None:
    """Checks that a teacher has all layers of a student.

    Raises:
        LayerPruneError: the teacher lacks a layer of the student.
    """
    if student.original != teacher.original or not set(student.kept) <= set(teacher.kept):
        raise LayerPruneError(
            f"The teacher has {teacher}, the student {student}. Give a teacher that has all layers of the "
            "student."
        )
