import dataclasses

import jax.numpy as jnp
import pytest

from distill.teachers.cached import CachedTeacher
from distill.teachers.live import LiveTeacher
from distill.teachers.teacher import Teacher
from distill.types import Capture, SparseSignal, SparseTarget
from tests.objectives.steps import SOFT, batch, decoder


def test_live_and_cached_teachers_implement_the_teacher_protocol():
  live = LiveTeacher(decoder=decoder(SOFT, SOFT), params={})
  cached = CachedTeacher(width=16, depth=2, vocab_size=31, identity="a")
  for teacher in (live, cached):
    assert isinstance(teacher, Teacher)
    assert (teacher.depth, teacher.width, teacher.vocab_size) == (2, 16, 31)
  assert (live.identity, cached.identity) == ("", "a")


def test_a_cached_teacher_returns_the_signal_of_the_batch_and_refuses_activations_not_in_it():
  rows, teacher = batch(1), CachedTeacher(width=16, depth=2, vocab_size=31, identity="a")
  target = SparseTarget(ids=jnp.zeros((1, 15, 2), int), log_probs=jnp.zeros((1, 15, 2)), tail=jnp.zeros((1, 15)))
  signal = SparseSignal(target=target, layers={1: jnp.zeros((1, 15, 16))})
  read = dataclasses.replace(rows, signal=signal)
  assert teacher.signal({}, batch=read, capture=Capture(layers=(1,)), dtype=jnp.float32) is signal
  with pytest.raises(AssertionError):
    teacher.signal({}, batch=read, capture=Capture(layers=(0,)), dtype=jnp.float32)
  with pytest.raises(AssertionError):
    teacher.signal({}, batch=rows, capture=Capture(), dtype=jnp.float32)
