"""A report groups its rows and can be written as JSON."""

import json

from tests.evaluation.rows import THREE, report


def test_report_by_skill_yields_rows_in_the_order_of_the_models():
  (rows,) = report(*THREE).by_skill()
  assert [(row.role, row.name) for row in rows] == list(THREE)


def test_a_models_label_is_its_role_or_its_name_if_the_role_is_not_unique():
  assert report(*THREE, ("student", "newer")).labels == ("base", "stack", "new", "newer")


def test_the_json_report_has_a_row_for_each_model_and_skill():
  plain = json.loads(json.dumps(report(*THREE).to_json()))
  assert plain["schema"] == 2 and len(plain["models"]) == len(plain["skills"]) == len(plain["fidelity"]) == 3
  assert plain["skills"][2]["retention"]["value"] == 0.8 and plain["skills"][0]["retention"] is None
