"""Multiple-choice skills: a model's answer is the choice with the highest log-probability after the prompt."""

import dataclasses
import functools
import json
import pathlib
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from transformers import PreTrainedTokenizerBase

from distill.errors import InputError
from distill.evaluation.model import EvaluatedModel

_ROWS = 32  # Prompts that the devices run at once.
_BUCKET = 32  # Rows are padded to a multiple of this, since each length is compiled for itself.


@dataclasses.dataclass(frozen=True)
class Example:
  """A multiple-choice question: a prompt, its choices, and the index of the right choice."""

  prompt: str
  choices: tuple[str, ...]
  answer: int


@dataclasses.dataclass(frozen=True)
class Skill:
  """A named test of multiple-choice questions."""

  name: str
  examples: tuple[Example, ...]

  @property
  def chance(self) -> float:
    """Returns the expected accuracy of guessing: 1 / number of choices, averaged over the examples."""
    return float(np.mean([1 / len(example.choices) for example in self.examples]))


def read_skill(path: pathlib.Path) -> Skill:
  """Reads a skill from JSON lines of {"skill", "prompt", "choices", "answer"}; answer is the index of a choice, from 0.

  Raises:
    InputError: The file is missing, a line has another form, or the lines are not all of one skill.
  """
  path = pathlib.Path(path)
  try:
    lines = path.read_text(encoding="utf-8").splitlines()
  except OSError as error:
    raise InputError(f"{path}: cannot be read ({error.strerror}); correct config.evaluation.skills") from error
  examples, names = [], set()
  for number, line in enumerate(lines, 1):
    try:
      fields = json.loads(line)
      example = Example(str(fields["prompt"]), tuple(map(str, fields["choices"])), int(fields["answer"]))
      names.add(str(fields["skill"]))
    except (ValueError, KeyError, TypeError) as error:
      raise InputError(
        f"{path}:{number}: this line is not a question ({error}); give a JSON object with the keys skill, prompt, "
        "choices and answer"
      ) from error
    if not 0 <= example.answer < len(example.choices) or len(example.choices) < 2 or not example.prompt:
      raise InputError(
        f"{path}:{number}: a part of the question is missing or wrong; give a prompt, at least two choices, and as "
        "answer the index of the right choice, from 0"
      )
    examples.append(example)
  if len(names) != 1:
    raise InputError(
      f"{path}: expected the questions of one skill, found {len(names)} skills; give each skill a file of its own"
    )
  return Skill(names.pop(), tuple(examples))


def correct_answers(model: EvaluatedModel, *, skill: Skill, tokenizer: PreTrainedTokenizerBase) -> np.ndarray:
  """Returns which of a skill's questions a model answers correctly.

  Args:
    model: The model.
    skill: The questions.
    tokenizer: The model's tokenizer.

  Returns:
    True for each correct answer, bool [examples].
  """
  prompts = [_ids(tokenizer, example.prompt) for example in skill.examples]
  choices = [[_ids(tokenizer, f" {choice}") for choice in example.choices] for example in skill.examples]
  # Choices of one token each need a single forward pass of the prompt.
  if all(len(ids) == 1 for group in choices for ids in group):
    rows = [(prompt, [len(prompt) - 1]) for prompt in prompts]
    scores = _log_probs(model, rows)
    picked = [int(np.argmax([row[0, ids[0]] for ids in group])) for row, group in zip(scores, choices, strict=True)]
  else:
    picked = _pick(model, prompts, choices)
  return np.asarray([pick == example.answer for pick, example in zip(picked, skill.examples, strict=True)])


def _ids(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
  return tokenizer(text, add_special_tokens=False)["input_ids"]


def _pick(model: EvaluatedModel, prompts: Sequence[list[int]], choices: Sequence[list[list[int]]]) -> list[int]:
  """Returns, for each prompt, the index of its choice (token ids) with the highest summed log-probability."""
  pairs = [(prompt, ids) for prompt, group in zip(prompts, choices, strict=True) for ids in group]
  rows = [(prompt + ids[:-1], list(range(len(prompt) - 1, len(prompt) + len(ids) - 1))) for prompt, ids in pairs]
  scores = iter(
    sum(row[i, token] for i, token in enumerate(ids))
    for row, (_, ids) in zip(_log_probs(model, rows), pairs, strict=True)
  )
  return [int(np.argmax([next(scores) for _ in group])) for group in choices]


def _log_probs(model: EvaluatedModel, rows: Sequence[tuple[list[int], list[int]]]) -> list[np.ndarray]:
  """Returns, for each row (tokens, positions), the next-token log-probabilities [positions, V] at these positions."""
  results: list[np.ndarray | None] = [None] * len(rows)
  places = max(len(at) for _, at in rows)
  order = sorted(range(len(rows)), key=lambda i: len(rows[i][0]))
  for start in range(0, len(order), _ROWS):
    part = order[start : start + _ROWS]
    length = -(-max(len(rows[i][0]) for i in part) // _BUCKET) * _BUCKET
    tokens, segments = np.zeros((2, _ROWS, length), np.int32)
    at = np.zeros((_ROWS, places), np.int32)
    for slot, i in enumerate(part):
      tokens[slot, : len(rows[i][0])] = rows[i][0]
      segments[slot, : len(rows[i][0])] = 1
      at[slot, : len(rows[i][1])] = rows[i][1]
    values = np.asarray(_forward(model.decoder)(model.params, tokens, segments, at))
    for slot, i in enumerate(part):
      results[i] = values[slot, : len(rows[i][1])]
  return results  # type: ignore[return-value]


@functools.cache
def _forward(decoder):
  @jax.jit
  def forward(params, tokens, segments, at):
    positions = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
    output = decoder.apply(params, tokens=tokens, segments=segments, positions=positions, dtype=jnp.float32)
    hidden = jnp.take_along_axis(output.hidden, at[..., None], axis=1)
    return jax.nn.log_softmax(output.readout.logits(hidden)[..., : output.readout.vocab_size])

  return forward
