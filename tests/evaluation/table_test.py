"""The printed table has a column for each model, and the retention of all models except base and teacher."""

from distill.evaluation.table import table
from tests.evaluation.rows import THREE, report


def test_the_table_has_columns_for_base_teacher_and_student():
  assert table(report(*THREE)).splitlines() == [
    "skill         chance    base   stack  student   retention of the stack's gain (95 %)",
    "book           25.0%   50.0%   50.0%    50.0%    80.0%  (75% to 85%)",
    "held-out text: KL 0.250 nats a token, top-1 agreement 75.0%, bits per byte base 1.500, stack 1.500, student 1.500",
    "parameters: stack 1,000, student 1,000 (100.0%)",
  ]


def test_the_table_says_if_the_adapter_stack_gains_nothing_in_a_skill():
  assert table(report(*THREE, retained=None)).splitlines()[1].endswith("   the stack gains nothing")


def test_a_model_in_the_role_control_gets_its_own_table_column_and_retention():
  lines = table(report(*THREE, ("control", "new"), heldout=False)).splitlines()
  assert lines[0].endswith("student  control   retention of the stack's gain (95 %): student, control")
  assert lines[1].count("(75% to 85%)") == 2
  assert lines[2] == "parameters: stack 1,000, student 1,000 (100.0%), control 1,000 (100.0%)"


def test_table_columns_of_models_with_the_same_role_are_labelled_by_name():
  assert table(report(("student", "one"), ("student", "two"))).splitlines()[0] == "skill         chance     one     two"


def test_without_a_teacher_the_table_has_no_retention_and_no_share_of_parameters():
  lines = table(report(("student", "new"), heldout=False)).splitlines()
  assert lines == ["skill         chance  student", "book           25.0%    50.0%", "parameters: student 1,000"]
