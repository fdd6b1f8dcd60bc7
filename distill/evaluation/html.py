"""Renders a comparison as one self-contained HTML page with inline charts, for light and dark mode."""

import html
from collections.abc import Mapping, Sequence
from typing import Any

from distill.evaluation.model import BASE, STUDENT, TEACHER
from distill.evaluation.report import FidelityRow, ModelRow, Report, SkillRow, is_measured

_STYLE = """
:root{--paper:#fbfaf7;--ink:#1d2126;--soft:#6b7178;--line:#dedbd3;--base:#a7a29a;--student:#d1495b;--stack:#2e6f95;
--second:#3c8d70;--third:#b07d2b;--card:#fff}
@media (prefers-color-scheme:dark){:root{--paper:#14171a;--ink:#eceae4;--soft:#9aa0a6;--line:#31363b;--base:#7d7a74;
--student:#ef7686;--stack:#6db3dc;--second:#6cc3a0;--third:#d9ab5c;--card:#1b1f23}}
*{box-sizing:border-box}body{margin:0;background:var(--paper);color:var(--ink);
font:16px/1.5 ui-sans-serif,system-ui,-apple-system,"Segoe UI",Helvetica,Arial,sans-serif}
main{max-width:60rem;margin:0 auto;padding:2.5rem 1.25rem 4rem}h1{font-size:1.9rem;line-height:1.2;margin:0 0 .4rem;
letter-spacing:-.02em}h2{font-size:1.15rem;margin:3rem 0 .3rem}p{margin:.2rem 0 1rem;max-width:44rem}
.soft,figcaption,caption{color:var(--soft)}.tiles{display:grid;gap:1rem;margin:1.75rem 0;
grid-template-columns:repeat(auto-fit,minmax(11rem,1fr))}.tile{background:var(--card);border:1px solid var(--line);
border-radius:.75rem;padding:1rem 1.1rem}.tile b{display:block;font-size:2.3rem;line-height:1.15;font-weight:650;
letter-spacing:-.03em;font-variant-numeric:tabular-nums}.tile small{color:var(--soft)}.tile.plain b{font-size:1.6rem}
figure{margin:1rem 0}svg{display:block;width:100%;height:auto;overflow:visible}svg text{fill:var(--ink);font-size:13px}
svg .soft{fill:var(--soft);font-size:12px}.axis{stroke:var(--line)}.chance{stroke:var(--soft);stroke-dasharray:3 4}
.key{display:flex;flex-wrap:wrap;gap:.3rem 1.2rem;color:var(--soft);font-size:.9rem}.key i{display:inline-block;
width:.75rem;height:.75rem;border-radius:50%;margin-right:.4rem;vertical-align:-.05rem}
details{margin:.5rem 0}summary{cursor:pointer;color:var(--soft)}.scroll{overflow-x:auto}
table{border-collapse:collapse;font-variant-numeric:tabular-nums;font-size:.92rem}th,td{text-align:right;
padding:.3rem .8rem;border-bottom:1px solid var(--line)}th:first-child,td:first-child{text-align:left;padding-left:0}
.strip{display:flex;gap:3px;margin:.25rem 0 1rem}.strip i{flex:1;height:1.6rem;border-radius:4px;max-width:4.5rem}
footer{margin-top:3rem;border-top:1px solid var(--line);padding-top:1rem;color:var(--soft);font-size:.88rem}
"""
# Colour and name of the roles that every comparison of a student has; others take the spare colours in turn.
_COLOURS = {BASE: "var(--base)", STUDENT: "var(--student)", TEACHER: "var(--stack)"}
_SPARE_COLOURS = ("var(--second)", "var(--third)")
_MIXERS = {
  "attention": ("var(--stack)", "softmax attention"),
  "gated delta": ("var(--second)", "gated delta rule"),
  "Mamba-2": ("var(--third)", "Mamba-2 state space"),
}


def render(report: Report) -> str:
  """Returns the HTML page of a comparison; every name in it is escaped."""
  names, colours = report.labels, _colours(report)
  # In the order of the circles: the base, the measured models, the teacher.
  key = sorted(zip(report.models, names, colours, strict=True), key=lambda one: one[0].role == TEACHER)
  body = [
    "<h1>What the student retains</h1>",
    *(_lead(report, model) for model in report.models if is_measured(model)),
    f'<div class="tiles">{"".join(_headlines(report))}</div>',
    "<h2>Skill by skill</h2>",
    "<p>Accuracy on held-out questions. The stack is the base with its adapters, the student's teacher. Retention is "
    "the share of the stack's gain over the base that the student retains, where guessing counts as nothing; whiskers "
    "are 95 % bootstrap intervals.</p>",
    _key([(name, colour) for _, name, colour in key]),
    f"<figure>{_skills_chart(report)}</figure>",
    _skills_table(report),
  ]
  if report.fidelity:
    body += ["<h2>On held-out text</h2>", _fidelity(report)]
  if report.curves:
    body += ["<h2>Training</h2>", _curves(report.curves)]
  shown = [(label, model) for label, model in zip(report.labels, report.models, strict=True) if model.role != BASE]
  body += ["<h2>Architectures</h2>", *(_strip(label, model) for label, model in shown)]
  body.append(_mixer_key([model for _, model in shown]))
  lines = [f"{_e(label[:1].upper() + label[1:])}: {_e(model.name)}" for label, model in shown]
  body.append(
    f"<footer>{'<br>'.join([*lines, 'Made by distill compare; the figures are in report.json beside this page.'])}"
    "</footer>"
  )
  return (
    '<!doctype html><html lang="en"><head><meta charset="utf-8">'
    '<meta name="viewport" content="width=device-width,initial-scale=1"><title>What the student retains</title>'
    f"<style>{_STYLE}</style></head><body><main>{''.join(body)}</main></body></html>\n"
  )


def _e(text: Any) -> str:
  return html.escape(str(text))


def _colours(report: Report) -> list[str]:
  spare = [model for model in report.models if model.role not in _COLOURS]
  return [
    _COLOURS[model.role] if model.role in _COLOURS else _SPARE_COLOURS[spare.index(model) % len(_SPARE_COLOURS)]
    for model in report.models
  ]


def _lead(report: Report, model: ModelRow) -> str:
  teacher, text = report.teacher, f"A {model.family} {model.role} of {model.parameters:,} parameters"
  if teacher is not None:
    share = model.parameters / teacher.parameters
    text += f", {share:.0%} of its {teacher.family} teacher, after distillation"
  return f'<p class="soft">{_e(text)}. {_e(report.date)}.</p>'


def _headlines(report: Report) -> list[str]:
  """Returns an HTML tile for each skill of each model other than base and teacher.

  A tile shows the retention (see `SkillRow`). The list is empty unless both base and teacher are in the report.
  """
  tiles = []
  for rows in report.by_skill():
    measured = [(label, row) for label, row in zip(report.labels, rows, strict=True) if is_measured(row)]
    for label, row in measured if report.has_retention else []:
      title = row.skill if len(measured) == 1 else f"{row.skill}, {label}"
      retained, figure, small = row.retention, "–", "the stack gains nothing"
      if retained is not None:
        figure, small = f"{retained.value:.0%}", f"retained, {retained.low:.0%} to {retained.high:.0%}"
      tiles.append(f'<div class="tile"><small>{_e(title)}</small><b>{figure}</b><small>{small}</small></div>')
  return tiles


def _key(entries: Sequence[tuple[str, str]]) -> str:
  marks = "".join(f'<span><i style="background:{colour}"></i>{_e(name)}</span>' for name, colour in entries)
  return f'<div class="key">{marks}</div>'


def _offsets(report: Report) -> list[int]:
  """Returns how many pixels each model's circle is below the base's in a chart; negative (above) for the teacher."""
  offsets, below = [], 0
  for model in report.models:
    below += 7 if is_measured(model) else 0
    offsets.append({BASE: 0, TEACHER: -7}.get(model.role, below))
  return offsets


def _skills_chart(report: Report) -> str:
  left, right, row = 110, 700, 62
  skills = list(report.by_skill())
  height = row * len(skills) + 34

  def x(value: float) -> float:
    return left + value * (right - left)

  parts = [f'<line class="axis" x1="{x(t / 4)}" x2="{x(t / 4)}" y1="8" y2="{height - 26}"/>' for t in range(5)]
  parts += [
    f'<text class="soft" text-anchor="middle" x="{x(t / 4)}" y="{height - 8}">{25 * t} %</text>' for t in range(5)
  ]
  for index, rows in enumerate(skills):
    y = 36 + index * row
    chance = x(rows[0].chance)
    parts.append(f'<text x="0" y="{y + 5}">{_e(rows[0].skill)}</text>')
    parts.append(f'<line class="chance" x1="{chance:.1f}" x2="{chance:.1f}" y1="{y - 22}" y2="{y + 22}"/>')
    if index == 0:
      parts.append(f'<text class="soft" x="{chance + 5:.1f}" y="{y - 15}">chance</text>')
    for label, one, colour, offset in zip(report.labels, rows, _colours(report), _offsets(report), strict=True):
      value = one.accuracy
      parts.append(
        f'<line x1="{x(value.low):.1f}" x2="{x(value.high):.1f}" y1="{y + offset}" y2="{y + offset}" '
        f'stroke="{colour}" stroke-width="2" stroke-linecap="round" opacity=".55"/>'
        f'<circle cx="{x(value.value):.1f}" cy="{y + offset}" r="6" fill="{colour}">'
        f"<title>{_e(label)}: {value.value:.1%}</title></circle>"
      )
  title = f"Accuracy of {_e(', '.join(report.labels))} on each skill"
  return f'<svg viewBox="0 0 720 {height}" role="img" aria-label="{title}"><title>{title}</title>{"".join(parts)}</svg>'


def _skills_table(report: Report) -> str:
  measured = [(label, model) for label, model in zip(report.labels, report.models, strict=True) if is_measured(model)]
  heads = ["skill", "questions", "chance", *report.labels]
  if report.has_retention:
    heads += ["retention" if len(measured) == 1 else f"retention, {label}" for label, _ in measured]
  lines = []
  for rows in report.by_skill():
    cells = [rows[0].skill, str(rows[0].examples), f"{rows[0].chance:.1%}"]
    cells += [f"{row.accuracy.value:.1%}" for row in rows] + (_retained(rows) if report.has_retention else [])
    lines.append(f"<tr>{''.join(f'<td>{_e(cell)}</td>' for cell in cells)}</tr>")
  head = f"<tr>{''.join(f'<th>{_e(one)}</th>' for one in heads)}</tr>"
  return (
    f'<details><summary>As a table</summary><div class="scroll"><table>{head}{"".join(lines)}</table></div></details>'
  )


def _retained(rows: Sequence[SkillRow]) -> list[str]:
  intervals = [row.retention for row in rows if is_measured(row)]
  return ["–" if one is None else f"{one.value:.1%}" for one in intervals]


def _fidelity(report: Report) -> str:
  compared = [(label, row) for label, row in zip(report.labels, report.fidelity, strict=True) if row.kl is not None]
  tiles = []
  for label, row in compared:
    tiles.append((f"{row.top1_agreement:.1%}", f"of next tokens of the {label} agree with the teacher's first choice"))
    tiles.append((f"{row.kl:.3f}", f"nats a token, KL(teacher ‖ {label})"))
  bits: list[tuple[str, FidelityRow]] = list(zip(report.labels, report.fidelity, strict=True))
  tiles += [(f"{row.bits_per_byte:.3f}", f"bits a byte, {label}") for label, row in bits]
  inner = "".join(f'<div class="tile plain"><b>{value}</b><small>{_e(what)}</small></div>' for value, what in tiles)
  return f'<div class="tiles">{inner}</div><p class="soft">{report.fidelity[0].tokens:,.0f} predicted tokens.</p>'


def _curves(lines: Sequence[Mapping[str, Any]]) -> str:
  stages: dict[str, list[tuple[int, float]]] = {}
  for line in lines:
    stages.setdefault(str(line.get("stage", "")), []).append((int(line["step"]), float(line["loss"])))
  charts = [_curve(name, points) for name, points in stages.items()]
  return f'<div class="tiles" style="grid-template-columns:repeat(auto-fit,minmax(17rem,1fr))">{"".join(charts)}</div>'


def _curve(name: str, points: Sequence[tuple[int, float]]) -> str:
  width, height, window = 320, 170, max(1, len(points) // 60)
  smooth = []
  for start in range(0, len(points), window):
    part = points[start : start + window]
    smooth.append((part[len(part) // 2][0], sum(loss for _, loss in part) / len(part)))
  steps, losses = [step for step, _ in smooth], [loss for _, loss in smooth]
  low, high = min(losses), max(losses)
  span, reach = (high - low) or 1.0, (steps[-1] - steps[0]) or 1
  path = " ".join(
    f"{'M' if i == 0 else 'L'}{34 + (step - steps[0]) / reach * (width - 44):.1f} "
    f"{14 + (high - loss) / span * (height - 48):.1f}"
    for i, (step, loss) in enumerate(smooth)
  )
  title = f"Loss of stage {name}: from {losses[0]:.3f} to {losses[-1]:.3f}"
  return (
    f'<figure class="tile"><svg viewBox="0 0 {width} {height}" role="img" aria-label="{_e(title)}">'
    f"<title>{_e(title)}</title>"
    f'<line class="axis" x1="34" x2="{width - 10}" y1="{height - 34}" y2="{height - 34}"/>'
    f'<path d="{path}" fill="none" stroke="var(--student)" stroke-width="2" stroke-linejoin="round"/>'
    f'<text class="soft" x="0" y="18">{high:.2g}</text><text class="soft" x="0" y="{height - 34}">{low:.2g}</text>'
    f'<text class="soft" x="34" y="{height - 16}">step {steps[0]}</text>'
    f'<text class="soft" text-anchor="end" x="{width - 10}" y="{height - 16}">{steps[-1]}</text></svg>'
    f"<figcaption>{_e(name)}: loss a token, {losses[0]:.3f} → {losses[-1]:.3f}</figcaption></figure>"
  )


def _strip(label: str, model: ModelRow) -> str:
  """Returns HTML with a coloured cell for each layer of a model; the colour says which kind of mixer it has."""
  cells = "".join(
    f'<i style="background:{_MIXERS.get(kind, ("var(--base)", kind))[0]}" title="layer {i}: {_e(kind)}"></i>'
    for i, kind in enumerate(model.layers)
  )
  return (
    f"<div>{_e(label)}: {len(model.layers)} layers of width {model.width}, {model.parameters:,} parameters</div>"
    f'<div class="strip">{cells}</div>'
  )


def _mixer_key(models: Sequence[ModelRow]) -> str:
  kinds = sorted({kind for model in models for kind in model.layers})
  return _key([(_MIXERS.get(kind, ("", kind))[1], _MIXERS.get(kind, ("var(--base)", ""))[0]) for kind in kinds])
