"""Formats the main figures of a comparison as aligned text."""

from collections.abc import Sequence

from distill.evaluation.report import FidelityRow, Report, SkillRow, is_measured


def table(report: Report) -> str:
  """Returns a text table: a line for each skill, one for held-out text if measured, and one of parameter counts."""
  labels = report.labels
  widths = [max(8, len(label) + 2) for label in labels]
  head = "".join(f"{label:>{width}}" for label, width in zip(labels, widths, strict=True))
  lines = [f"{'skill':<12}{'chance':>8}{head}{_retention_head(report)}"]
  for rows in report.by_skill():
    figures = "".join(f"{row.accuracy.value:>{width}.1%}" for row, width in zip(rows, widths, strict=True))
    retention = f"   {_retention(rows)}" if report.has_retention else ""
    lines.append(f"{rows[0].skill:<12}{rows[0].chance:>8.1%}{figures}{retention}")
  if report.fidelity:
    lines.append(_fidelity(report.fidelity, labels))
  lines.append(_sizes(report))
  return "\n".join(lines)


def _retention_head(report: Report) -> str:
  if not report.has_retention:
    return ""
  measured = [label for label, model in zip(report.labels, report.models, strict=True) if is_measured(model)]
  return "   retention of the stack's gain (95 %)" + (f": {', '.join(measured)}" if len(measured) > 1 else "")


def _retention(rows: Sequence[SkillRow]) -> str:
  intervals = [row.retention for row in rows if is_measured(row)]
  if not any(intervals):
    return "the stack gains nothing"
  return "   ".join(f"{one.value:6.1%}  ({one.low:.0%} to {one.high:.0%})" for one in intervals if one)


def _fidelity(rows: Sequence[FidelityRow], labels: Sequence[str]) -> str:
  pairs = list(zip(labels, rows, strict=True))
  compared = [(label, row) for label, row in pairs if row.kl is not None]
  parts = []
  for label, row in compared:
    of = f"{label} " if len(compared) > 1 else ""
    parts.append(f"{of}KL {row.kl:.3f} nats a token, top-1 agreement {row.top1_agreement:.1%}")
  bits = ", ".join(f"{label} {row.bits_per_byte:.3f}" for label, row in pairs)
  return f"held-out text: {', '.join([*parts, f'bits per byte {bits}'])}"


def _sizes(report: Report) -> str:
  teacher, parts = report.teacher, []
  for label, model in zip(report.labels, report.models, strict=True):
    if is_measured(model):
      share = f" ({model.parameters / teacher.parameters:.1%})" if teacher else ""
      parts.append(f"{label} {model.parameters:,}{share}")
    elif model is teacher:
      parts.append(f"{label} {model.parameters:,}")
  return f"parameters: {', '.join(parts)}"
