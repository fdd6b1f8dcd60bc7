"""The comparison as one page that needs nothing else: inline charts, light and dark."""

import html
from collections.abc import Sequence
from typing import Any

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
_COLOURS = {"base": "var(--base)", "student": "var(--student)", "stack": "var(--stack)"}
_MIXERS = {
  "attention": ("var(--stack)", "softmax attention"),
  "gated delta": ("var(--second)", "gated delta rule"),
  "Mamba-2": ("var(--third)", "Mamba-2 state space"),
}


def render(report: dict[str, Any]) -> str:
  """The page of a report as made by `compare`."""
  skills, models = report["skills"], report["models"]
  share = models["student"]["parameters"] / models["teacher"]["parameters"]
  body = [
    "<h1>What the student kept</h1>",
    f'<p class="soft">A {_e(models["student"]["family"])} student of {models["student"]["parameters"]:,} parameters, '
    f"{share:.0%} of its {_e(models['teacher']['family'])} teacher, after distillation. {_e(report['date'])}.</p>",
    f'<div class="tiles">{"".join(map(_headline, skills))}</div>',
    "<h2>Skill by skill</h2>",
    "<p>Accuracy on held-out questions. Retention is the share of the adapters' gain over the bare base that the "
    "student still has, where guessing counts as nothing; whiskers are 95 % bootstrap intervals.</p>",
    _key([("bare base", _COLOURS["base"]), ("student", _COLOURS["student"]), ("base + adapters", _COLOURS["stack"])]),
    f"<figure>{_skills_chart(skills)}</figure>",
    _skills_table(skills),
  ]
  if report["fidelity"]:
    body += ["<h2>On held-out text</h2>", _fidelity(report["fidelity"])]
  if report["curves"]:
    body += ["<h2>Training</h2>", _curves(report["curves"])]
  body += ["<h2>Architectures</h2>", *(_strip(name, model) for name, model in models.items()), _mixer_key(models)]
  body.append(
    f"<footer>Student: {_e(models['student']['name'])}<br>Teacher: {_e(models['teacher']['name'])}<br>"
    "Made by distill compare; the figures are in report.json beside this page.</footer>"
  )
  return (
    '<!doctype html><html lang="en"><head><meta charset="utf-8">'
    '<meta name="viewport" content="width=device-width,initial-scale=1"><title>What the student kept</title>'
    f"<style>{_STYLE}</style></head><body><main>{''.join(body)}</main></body></html>\n"
  )


def _e(text: Any) -> str:
  return html.escape(str(text))


def _headline(row: dict[str, Any]) -> str:
  kept = row["retention"]
  if kept is None:
    return f'<div class="tile"><small>{_e(row["name"])}</small><b>–</b><small>the stack gains nothing</small></div>'
  return (
    f'<div class="tile"><small>{_e(row["name"])}</small><b>{kept["value"]:.0%}</b>'
    f"<small>retained, {kept['low']:.0%} to {kept['high']:.0%}</small></div>"
  )


def _key(entries: Sequence[tuple[str, str]]) -> str:
  marks = "".join(f'<span><i style="background:{colour}"></i>{_e(name)}</span>' for name, colour in entries)
  return f'<div class="key">{marks}</div>'


def _skills_chart(skills: Sequence[dict[str, Any]]) -> str:
  left, right, row = 110, 700, 62
  height = row * len(skills) + 34

  def x(value: float) -> float:
    return left + value * (right - left)

  parts = [f'<line class="axis" x1="{x(t / 4)}" x2="{x(t / 4)}" y1="8" y2="{height - 26}"/>' for t in range(5)]
  parts += [
    f'<text class="soft" text-anchor="middle" x="{x(t / 4)}" y="{height - 8}">{25 * t} %</text>' for t in range(5)
  ]
  for index, skill in enumerate(skills):
    y = 36 + index * row
    chance = x(skill["chance"])
    parts.append(f'<text x="0" y="{y + 5}">{_e(skill["name"])}</text>')
    parts.append(f'<line class="chance" x1="{chance:.1f}" x2="{chance:.1f}" y1="{y - 22}" y2="{y + 22}"/>')
    if index == 0:
      parts.append(f'<text class="soft" x="{chance + 5:.1f}" y="{y - 15}">chance</text>')
    for name, offset in (("base", 0), ("stack", -7), ("student", 7)):
      value, colour = skill[name], _COLOURS[name]
      parts.append(
        f'<line x1="{x(value["low"]):.1f}" x2="{x(value["high"]):.1f}" y1="{y + offset}" y2="{y + offset}" '
        f'stroke="{colour}" stroke-width="2" stroke-linecap="round" opacity=".55"/>'
        f'<circle cx="{x(value["value"]):.1f}" cy="{y + offset}" r="6" fill="{colour}">'
        f"<title>{_e(name)}: {value['value']:.1%}</title></circle>"
      )
  title = "Accuracy of base, student and base with adapters on each skill"
  return f'<svg viewBox="0 0 720 {height}" role="img" aria-label="{title}"><title>{title}</title>{"".join(parts)}</svg>'


def _skills_table(skills: Sequence[dict[str, Any]]) -> str:
  rows = []
  for skill in skills:
    kept = skill["retention"]
    cells = "".join(f"<td>{skill[name]['value']:.1%}</td>" for name in ("base", "stack", "student"))
    rows.append(
      f"<tr><td>{_e(skill['name'])}</td><td>{skill['examples']}</td><td>{skill['chance']:.1%}</td>{cells}"
      f"<td>{'–' if kept is None else format(kept['value'], '.1%')}</td></tr>"
    )
  head = "<tr><th>skill</th><th>questions</th><th>chance</th><th>base</th><th>base + adapters</th><th>student</th>"
  return (
    f'<details><summary>As a table</summary><div class="scroll"><table>{head}<th>retention</th></tr>'
    f"{''.join(rows)}</table></div></details>"
  )


def _fidelity(far: dict[str, float]) -> str:
  tiles = [
    (f"{far['top1_agreement']:.1%}", "of next tokens agree with the teacher's first choice"),
    (f"{far['kl']:.3f}", "nats a token, KL(teacher ‖ student)"),
    (f"{far['bits_per_byte_student']:.3f}", "bits a byte, student"),
    (f"{far['bits_per_byte_teacher']:.3f}", "bits a byte, base + adapters"),
    (f"{far['bits_per_byte_base']:.3f}", "bits a byte, bare base"),
  ]
  inner = "".join(f'<div class="tile plain"><b>{value}</b><small>{_e(what)}</small></div>' for value, what in tiles)
  return f'<div class="tiles">{inner}</div><p class="soft">{far["tokens"]:,.0f} predicted tokens.</p>'


def _curves(lines: Sequence[dict[str, Any]]) -> str:
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


def _strip(name: str, model: dict[str, Any]) -> str:
  cells = "".join(
    f'<i style="background:{_MIXERS.get(kind, ("var(--base)", kind))[0]}" title="layer {i}: {_e(kind)}"></i>'
    for i, kind in enumerate(model["layers"])
  )
  return (
    f"<div>{_e(name)}: {len(model['layers'])} layers of width {model['width']}, "
    f"{model['parameters']:,} parameters</div>"
    f'<div class="strip">{cells}</div>'
  )


def _mixer_key(models: dict[str, Any]) -> str:
  kinds = sorted({kind for model in models.values() for kind in model["layers"]})
  return _key([(_MIXERS.get(kind, ("", kind))[1], _MIXERS.get(kind, ("var(--base)", ""))[0]) for kind in kinds])
