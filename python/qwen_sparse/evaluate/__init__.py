"""How accurate a model is at each context length: retrieval, tracking, counting, questions, perplexity, recall.

``qwen-sparse eval`` is the command line of it. In Python:

>>> from qwen_sparse.evaluate import evaluate_tasks, niah
>>> rows = evaluate_tasks(model, [niah(needles=4)], ["dca", "dca+sparse"], lengths=[65536], depths=[0.5], samples=2)
"""

from __future__ import annotations

from .modes import Mode, default_modes
from .needles import niah, passkey, variable_tracking
from .perplexity import evaluate_perplexity
from .probes import Probe, ProbedText, evaluate_probes, make_probed_text
from .prompts import Needle, Prompt, Task, make_prompt
from .questions import question_answering, read_questions
from .recall import evaluate_recall
from .run import Answer, answer, evaluate_tasks
from .words import common_words, frequent_words

__all__ = [
    "Answer",
    "Mode",
    "Needle",
    "Probe",
    "ProbedText",
    "Prompt",
    "Task",
    "answer",
    "common_words",
    "default_modes",
    "evaluate_perplexity",
    "evaluate_probes",
    "evaluate_recall",
    "evaluate_tasks",
    "frequent_words",
    "make_probed_text",
    "make_prompt",
    "niah",
    "passkey",
    "question_answering",
    "read_questions",
    "variable_tracking",
]
