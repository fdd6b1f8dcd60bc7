"""Every source file has a test file of the same name, or one that `ELSEWHERE` lists."""

import fnmatch
import pathlib

import pytest

TESTS = pathlib.Path(__file__).resolve().parent
LIBRARY = TESTS.parent / "distill"
# Pattern of source files without a test file of their name -> the test file that covers them.
ELSEWHERE = {
  # Families are one table: each is compared with transformers, and refused, converted and decoded in the same way.
  "checkpoints/families/*.py": "checkpoints/families/parity_test.py",
  "checkpoints/family.py": "checkpoints/registry_test.py",
  # Commands read flags and call one job, which has tests of its own.
  "cli/*.py": "cli/main_test.py",
  # Tables of figures, and fields with defaults.
  "planning/chips.py": "planning/estimate_test.py",
  # Merging is tested on whole stacks, against PEFT.
  "adapters/merging.py": "adapters/stack_test.py",
  "adapters/peft_writer.py": "adapters/peft_test.py",
  "adapters/config.py": "jobs/config_test.py",
  "data/config.py": "jobs/config_test.py",
  "teachers/config.py": "jobs/config_test.py",
  "training/config.py": "jobs/config_test.py",
  "models/config.py": "models/decoder_test.py",
  "models/remat.py": "training/memory_test.py",
  "objectives/term.py": "objectives/extension_test.py",
  "errors.py": "cli/main_test.py",
  # Terms of one line each: a token loss of distill/losses.
  "objectives/cross_entropy.py": "objectives/objective_test.py",
  "objectives/z_loss.py": "objectives/objective_test.py",
  # Parts of whole runs, which the tests of these runs enter.
  "jobs/prepare.py": "jobs/train_test.py",
  "jobs/stage_state.py": "jobs/jobs_test.py",
  "jobs/stages.py": "jobs/train_test.py",
  "training/step.py": "training/golden_step_test.py",
  "teachers/cache_*.py": "jobs/cache_test.py",
  "teachers/cached.py": "teachers/teacher_test.py",
  "teachers/live.py": "teachers/teacher_test.py",
  "teachers/row_format.py": "teachers/sections_test.py",
  "data/tokenizer.py": "cli/strangers_test.py",
  "evaluation/model.py": "evaluation/fidelity_test.py",
}
SOURCES = sorted(
  path.relative_to(LIBRARY).as_posix()
  for path in LIBRARY.rglob("*.py")
  if path.name not in ("__init__.py", "__main__.py")
)


@pytest.mark.parametrize("source", SOURCES)
def test_every_source_file_has_a_test_file(source):
  named = [test for pattern, test in ELSEWHERE.items() if fnmatch.fnmatch(source, pattern)]
  own = f"{source.removesuffix('.py')}_test.py"
  assert any((TESTS / test).exists() for test in (own, *named)), f"no tests/{own}"


def test_every_entry_of_ELSEWHERE_names_existing_source_and_test_files():
  for pattern, test in ELSEWHERE.items():
    assert fnmatch.filter(SOURCES, pattern), pattern
    assert (TESTS / test).exists(), test
