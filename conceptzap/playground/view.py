"""What the page shows of receipts and scores, as HTML whose every text is escaped."""

from __future__ import annotations

import jinja2

from conceptzap.playground.work import Made, Shown

RECEIPTS = """
{% for one in shown.receipts %}
<section class="receipt">
  {% set state = "open" if one.fired else "shut" %}
  <header><b>{{ one.name }}</b><span class="{{ state }}">{{ state }}</span>
  <small>strength {{ "%g" | format(one.strength) }}, digest {{ one.digest[:12] }}</small></header>
  <p>{% for word, reading in one.words %}
  {% if reading is none %}
  <span class="word">{{ word }}</span>
  {% else %}
  {% set part = "%.0f" | format(16 + 40 * (reading | abs)) %}
  <span class="word {{ 'opens' if reading > 0 }}" style="--part: {{ part }}%"
    title="{{ "%+.2f" | format(reading) }} of the threshold">{{ word }}</span>
  {% endif %}
  {% endfor %}</p>
  {% if one.words[0][1] is none %}<small>No gate of it reads the text.</small>{% endif %}
</section>
{% else %}
<section class="receipt"><small>No erasure: the original's picture.</small></section>
{% endfor %}
{% if shown.receipts %}
<small>Red words open the gate by themselves, blue ones are below its threshold, the further the stronger;
(end) has read the whole text.</small>
{% endif %}
"""
SCORES = """
<p class="said">{{ made.said }}</p>
{% if made.scores %}
<table class="scores"><thead><tr><th>score</th><th>value</th><th>95 %</th><th>n</th></tr></thead>
{% for row in made.scores %}<tr>{% for cell in row %}<td>{{ cell }}</td>{% endfor %}</tr>{% endfor %}</table>
{% endif %}
"""
STYLE = """
.gradio-container { width: 100%; max-width: 1180px !important; margin: 0 auto !important; }
.gradio-container main { padding: 16px 14px !important; }
#head h1 { font-size: 1.6rem; margin: 0; } #head p { margin: .2rem 0 0; }
#pictures img { image-rendering: pixelated; }
.receipt { margin-bottom: .9rem; } .receipt p { margin: .4rem 0; line-height: 2; }
.receipt header { display: flex; flex-wrap: wrap; gap: .6rem; align-items: baseline; }
.receipt header span { padding: 0 .5em; border-radius: 1em; border: 1px solid; font-size: .8rem; }
.word { padding: .15em .4em; border-radius: .3em; margin-right: .2em; white-space: nowrap;
  background: color-mix(in srgb, #7fb0ee var(--part, 0%), transparent); }
.word.opens { background: color-mix(in srgb, #f2777a var(--part), transparent); font-weight: 600; }
#said { min-height: 12rem; }
.said { white-space: pre-line; margin: 0 0 .8rem; }
.scores { border-collapse: collapse; border: 0; }
.scores th, .scores td { text-align: right; padding: .25rem .8rem .25rem 0; border: 0;
  border-bottom: 1px solid #8886; }
.scores th:first-child, .scores td:first-child { text-align: left; }
"""


def receipts(shown: Shown) -> str:
    """Every erasure with its state and strength, the prompt's words coloured by what its gates read."""
    return _render(RECEIPTS, shown=shown)


def scores(made: Made) -> str:
    """The verdict and the scores of a new erasure."""
    return _render(SCORES, made=made)


def _render(template: str, **given: object) -> str:
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True)
    return environment.from_string(template).render(**given)
