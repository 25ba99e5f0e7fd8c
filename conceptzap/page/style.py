"""The report's looks: one style sheet, light and dark, for the screen and for paper."""

from __future__ import annotations

CSS = """
:root { color-scheme: light dark; --paper: #fdfdfb; --ink: #1d1f23; --soft: #6b7078; --line: #e2e2dc;
  --card: #f4f4ef; --good: #2e7d5b; --bad: #b3402e; --bar: #5a7fb0; --base: #b9c0ca; }
@media (prefers-color-scheme: dark) { :root { --paper: #16181c; --ink: #e8e8e4; --soft: #9aa0a8;
  --line: #2c3037; --card: #1e2126; --good: #63c39a; --bad: #ef8a78; --bar: #86aadb; --base: #4b525d; } }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 68rem; padding: 2.5rem 1.25rem 4rem; background: var(--paper);
  color: var(--ink); font: 15px/1.55 system-ui, sans-serif; }
h1 { font-size: 1.7rem; margin: 0 0 .2rem; }
h2 { font-size: 1.1rem; margin: 2.4rem 0 .7rem; border-bottom: 1px solid var(--line); padding-bottom: .3rem; }
p, .soft { color: var(--soft); }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { text-align: left; padding: .2rem .9rem .2rem 0; border-bottom: 1px solid var(--line);
  vertical-align: top; overflow-wrap: anywhere; }
td.n, th.n { text-align: right; white-space: nowrap; }
.cards { display: grid; grid-template-columns: repeat(auto-fit, minmax(9.5rem, 1fr)); gap: .8rem; }
.card { background: var(--card); border-radius: .6rem; padding: .8rem 1rem; }
.card b { display: block; font-size: 1.6rem; line-height: 1.2; }
.card span { display: block; color: var(--soft); font-size: .82rem; }
.fails { border-left: 4px solid var(--bad); background: var(--card); padding: .6rem 1rem; margin: 1rem 0; }
.stands { border-left-color: var(--good); }
.grid { overflow-x: auto; }
.grid table { border: 0; } .grid td, .grid th { border: 0; padding: .15rem .25rem; text-align: center; }
.grid th { font-weight: 500; color: var(--soft); text-align: right; padding-right: .6rem; }
.grid td { font-size: .72rem; color: var(--soft); width: 104px; min-width: 104px; line-height: 1.25; }
.grid img { width: 96px; height: 96px; image-rendering: pixelated; border-radius: 4px; display: block; }
.leaks img { outline: 3px solid var(--bad); } .broken img { outline: 3px dashed var(--bad); }
.bar { position: relative; height: .85rem; min-width: 14rem; background: var(--card); border-radius: 3px; }
.bar i { position: absolute; inset: 0 auto 0 0; background: var(--bar); border-radius: 3px; }
.bar i.was { background: var(--base); }
.bar u { position: absolute; top: 42%; height: 16%; background: var(--ink); opacity: .65; }
.two { display: grid; grid-template-columns: repeat(auto-fit, minmax(22rem, 1fr)); gap: 1.5rem; }
code { font-size: .82rem; overflow-wrap: anywhere; }
@media print { body { max-width: none; } .grid { break-inside: avoid; } }
"""
