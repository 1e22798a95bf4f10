"""The exercises by number, notebook and place in it; what each asks is in the file of its subject."""

from gemma_qat_kit.classroom import about_chat, about_memory, about_training, about_weights
from gemma_qat_kit.classroom.problem import Draw, Problem
from gemma_qat_kit.errors import unknown_name

EXERCISES = {
    "01.1": about_weights.bytes_of_a_matrix,
    "01.2": about_weights.scale_of_a_group,
    "01.3": about_weights.code_of_a_weight,
    "02.1": about_memory.longest_context,
    "02.2": about_memory.adapter_on_a_card,
    "02.3": about_memory.cache_by_hand,
    "03.1": about_training.gradient_of_a_scale,
    "03.2": about_training.share_recovered,
    "03.3": about_training.training_beyond_scales,
    "04.1": about_training.values_of_an_adapter,
    "04.2": about_training.codes_that_move,
    "04.3": about_training.a_habit_learnt,
    "05.1": about_chat.fastest_pace,
    "05.2": about_chat.waiting_for_thoughts,
}


def find_problem(number: str, student: str | None) -> Problem:
    """Return an exercise with the usual numbers, or with those of a student.

    Raises:
        UnknownNameError: There is no such exercise.
    """
    if number not in EXERCISES:
        raise unknown_name("exercise", number, EXERCISES)
    return EXERCISES[number](Draw(number, student))
