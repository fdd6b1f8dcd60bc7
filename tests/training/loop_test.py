"""The training loop reads batches, logs, saves and stops at the right steps."""

import dataclasses

import jax.numpy as jnp
import numpy as np

from distill.parallel.mesh import make_mesh
from distill.training import loop
from distill.training.step import TrainState
from distill.types import Batch


class Source:
  """A batch source whose tokens all equal the step number; it records the parameters that it is given."""

  def __init__(self):
    self.seen = []

  def batch(self, step, params):
    self.seen.append(int(params["total"]))
    rows = np.full((8, 2), step, np.int32)
    return Batch(tokens=rows, segments=rows, positions=rows, loss_mask=rows.astype(np.float32))


def trained(*, start=0, steps=5, save_every=2, stop_after=100):
  """Runs a loop whose only parameter sums one token of each batch; returns (that sum, steps done, source, events)."""
  events, source = [], Source()

  def step(state, teacher_params, batch):
    total = state.trained["total"] + batch.tokens[0, 0]
    events.append(("step", int(total)))
    return dataclasses.replace(state, trained={"total": total}), {"loss": total.astype(jnp.float32)}

  hooks = loop.Hooks(
    log=lambda done, values: events.append(("log", done, values["loss"])),
    save=lambda state, done: events.append(("save", done)),
    save_after=lambda done: done % save_every == 0,
    stop=lambda: len(source.seen) >= stop_after,
  )
  zero = jnp.zeros((), jnp.int32)
  state, done = loop.run(
    TrainState(trained={"total": zero}, frozen={}, optimizer=(), step=zero, terms={}),
    step=step,
    teacher_params={},
    source=source,
    mesh=make_mesh(),
    start=start,
    steps=steps,
    hooks=hooks,
  )
  return int(state.trained["total"]), done, source, events


def test_the_batch_source_gets_the_current_parameters_at_every_step():
  total, done, source, _ = trained()
  assert (total, done) == (0 + 1 + 2 + 3 + 4, 5)
  assert source.seen == [0, 0, 1, 3, 6]


def test_a_step_is_dispatched_before_the_previous_step_is_logged():
  *_, events = trained(steps=3, save_every=100)
  assert events == [("step", 0), ("step", 1), ("log", 1, 0.0), ("step", 3), ("log", 2, 1.0), ("log", 3, 3.0)]


def test_all_steps_are_logged_before_a_checkpoint_is_saved():
  *_, events = trained(steps=4)
  saves = [i for i, event in enumerate(events) if event[0] == "save"]
  assert [events[i] for i in saves] == [("save", 2), ("save", 4)]
  assert [events[i - 1][:2] for i in saves] == [("log", 2), ("log", 4)]


def test_a_stop_request_saves_a_checkpoint_from_which_the_loop_can_continue():
  total, done, _, events = trained(stop_after=3)
  assert (total, done, events[-1]) == (3, 3, ("save", 3))
  _, done, source, _ = trained(start=3)
  assert done == 5 and len(source.seen) == 2
