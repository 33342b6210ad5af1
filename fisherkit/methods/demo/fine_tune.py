"""Fine-tuning of the demo's model on another kind of text.

The text is ``tasks``'s; only its answers are learnt. How a tuned model is pruned and scored is none of this module's
business.
"""

from collections.abc import Iterator
from pathlib import Path

import torch
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from fisherkit.checkpoint.index import open_index
from fisherkit.methods.demo.files import PARENT, is_reusable, no_progress_bar, save, written_aside
from fisherkit.methods.demo.held_out import learnt_tasks
from fisherkit.methods.demo.training import Course, Windows, learn, one_thread, windows
from fisherkit.progress import Say, Track

CONVERSATIONS = 4000
TUNING = Course(steps=600, learning_rate=5e-4, embedding_rate=2e-3)
"""Course of the fine-tune: ordinary rates, none chosen for what it does to the old text."""


def tune_model(
    base: Path,
    target: Path,
    *,
    track: Track = lambda stage, done, total: None,
    say: Say = lambda line: None,
    seconds: float = 25.0,
    course: Course = TUNING,
    conversations: int = CONVERSATIONS,
) -> Path:
    """Fine-tune all weights of the demo's model on small tasks, or reuse what an earlier run made of this very model.

    Args:
        base: what ``make_model`` made.
        target: folder of the tuned model.
        track: progress, called with stage, done and total.
        say: gets the lines meant for a person.
        seconds: wall time of the training loop.
        course: schedule and rates.
        conversations: questions and answers; of some the loss is said, and they are not learnt.

    Returns:
        ``target``.

    Raises:
        OutputError: the place is taken by something else, or cannot be written.
    """
    parent = open_index(base).fingerprint()
    if is_reusable(target, parent):
        say(f"{target}: made of {base} by an earlier run, used again (delete it to train anew)")
        return target
    with written_aside(target) as staged, one_thread():
        model, tokenizer = load(base), load_tokenizer(base)
        say(f"Fine-tuning {base} on numbers, dates, sorting and introductions ({seconds:.0f} seconds at most)")
        learn(model.float(), _task_windows(tokenizer, course, conversations), course, seconds, track, say)
        setattr(model.config, PARENT, parent)
        save(model, tokenizer, staged)
    say(f"{target}: saved")
    return target


def load(folder: Path) -> LlamaForCausalLM:
    """Load a model of the demo, as it is stored."""
    with no_progress_bar():
        return LlamaForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)


def load_tokenizer(folder: Path) -> PreTrainedTokenizerFast:
    """Load its tokenizer."""
    return PreTrainedTokenizerFast.from_pretrained(folder)


def _task_windows(tokenizer: PreTrainedTokenizerFast, course: Course, conversations: int) -> Windows:
    return windows(_task_pieces(tokenizer, course, conversations), course)


def _task_pieces(
    tokenizer: PreTrainedTokenizerFast, course: Course, conversations: int
) -> Iterator[tuple[list[int], bool]]:
    """Yield questions, which are only read, and answers up to the end of the text, which are learnt."""
    for conversation in learnt_tasks(conversations, course.seed):
        asked = tokenizer.apply_chat_template(conversation[:1], tokenize=False, add_generation_prompt=True)
        whole = tokenizer.apply_chat_template(conversation, tokenize=False) + tokenizer.eos_token
        yield tokenizer(asked, add_special_tokens=False).input_ids, False
        yield tokenizer(whole.removeprefix(asked), add_special_tokens=False).input_ids, True
