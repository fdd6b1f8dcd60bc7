"""The HTML report shows the figures, escapes every name, and needs no other file."""

from distill.evaluation.html import render
from tests.evaluation.rows import THREE, report


def test_the_html_report_loads_no_other_file_and_shows_the_figures():
  page = render(report(*THREE))
  assert "http" not in page and "<script" not in page and "src=" not in page
  for text in ("80%", "75% to 85%", "stack", "0.250", "softmax attention", "old + chat"):
    assert text in page


def test_names_of_models_and_skills_are_escaped_in_the_html_report():
  hostile = '<i onload="x">&'
  models = [(role, hostile + role) for role in ("base", "teacher", "student", hostile)]
  page = render(report(*models, skill=hostile, stage=hostile))
  assert "<i onload" not in page and 'onload="x"' not in page
  assert "&lt;i onload=&quot;x&quot;&gt;&amp;" in page


def test_each_model_role_has_its_own_colour_in_the_html_report():
  page = render(report(*THREE, ("control", "c"), ("ablation", "a")))
  assert 'fill="var(--second)"' in page and 'fill="var(--third)"' in page


def test_the_html_report_shows_accuracies_even_without_held_out_text_or_a_teacher():
  page = render(report(("student", "new"), heldout=False))
  assert "On held-out text" not in page and "retention" not in page.split("</p>")[-1] and "50.0%" in page
