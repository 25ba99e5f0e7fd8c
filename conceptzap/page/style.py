"""The report's looks: one style sheet, light and dark, for the screen and for paper."""

from __future__ import annotations

PICTURE = 128  # pixels a picture takes on the page

CSS = """
:root { color-scheme: light dark; --paper: #fdfdfb; --ink: #1d1f23; --soft: #686d75; --line: #e2e2dc;
  --card: #f3f3ee; --rail: #e4e4dd; --good: #2e7d5b; --bad: #c0432f; --bar: #5a7fb0; }
@media (prefers-color-scheme: dark) { :root { --paper: #15171b; --ink: #e9e9e5; --soft: #9ba1a9;
  --line: #2b2f36; --card: #1e2126; --rail: #31363e; --good: #63c39a; --bad: #f08875; --bar: #7fa4d8; } }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 76rem; padding: 2.5rem 1.25rem 4rem; background: var(--paper);
  color: var(--ink); font: 15px/1.5 system-ui, sans-serif; }
h1 { font-size: 1.9rem; line-height: 1.2; margin: 0 0 .2rem; }
h2 { font-size: 1.25rem; margin: 3rem 0 .8rem; padding-bottom: .35rem;
  border-bottom: 1px solid var(--line); }
h3 { font-size: 1rem; margin: 1.8rem 0 .6rem; }
h3 span { font-weight: 400; margin-left: .6rem; font-size: .87rem; }
p, .soft { color: var(--soft); } p { margin: .4rem 0; max-width: 52rem; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { text-align: left; padding: .28rem 1.1rem .28rem 0; border-bottom: 1px solid var(--line);
  vertical-align: middle; overflow-wrap: anywhere; }
th { font-size: .82rem; font-weight: 500; color: var(--soft); }
td.n, th.n { text-align: right; white-space: nowrap; }
td:first-child { white-space: nowrap; } .facts td { vertical-align: top; white-space: normal; }
.verdict { border-left: 4px solid var(--good); background: var(--card); border-radius: 0 .5rem .5rem 0;
  padding: .8rem 1.1rem; margin: 1.2rem 0; }
.verdict.fails { border-color: var(--bad); } .verdict b { color: var(--good); }
.verdict.fails b { color: var(--bad); } .verdict p { color: var(--ink); margin: 0 0 .3rem; max-width: none; }
.cards { display: flex; flex-wrap: wrap; gap: .8rem; }
.card { flex: 1 1 15rem; background: var(--card); border-radius: .6rem; padding: .8rem 1.1rem .9rem; }
.card b { font-size: 1.65rem; line-height: 1.25; }
.card div, .card span { color: var(--soft); font-size: .82rem; display: block; }
.bar, .range { position: relative; height: .7rem; min-width: 5rem; background: var(--rail);
  border-radius: .35rem; }
.range { height: .4rem; margin: .45rem 0 .5rem; }
.bar i, .range i { position: absolute; inset: 0 auto 0 0; background: var(--bar);
  border-radius: inherit; }
.range i { opacity: .55; min-width: 2px; }
.bar u, .bar s, .range u { position: absolute; }
.bar u { top: calc(50% - 1px); height: 2px; background: var(--ink); opacity: .6; }
.bar s, .range u { top: -.15rem; bottom: -.15rem; width: 3px; margin-left: -1.5px; background: var(--ink);
  border-radius: 2px; }
.grid { overflow-x: auto; } .grid td, .grid th { border: 0; padding: .2rem .25rem; }
.grid th { text-align: right; padding-right: .8rem; width: 5rem; min-width: 5rem; }
.grid td { width: 134px; min-width: 134px; text-align: center; vertical-align: top; white-space: normal;
  font-size: .76rem; color: var(--soft); line-height: 1.3; }
.grid tr:first-child td { vertical-align: bottom; } .grid td:first-child { vertical-align: middle; }
.grid img { width: 128px; height: 128px; border-radius: 5px; display: block; margin: 0 auto .2rem; }
.grid img.px { image-rendering: pixelated; }
.leaks img { outline: 3px solid var(--bad); } .broken img { outline: 3px dashed var(--bad); }
.key { display: inline-block; width: 1rem; height: 1rem; vertical-align: -.15rem; margin: 0 .3rem 0 .8rem;
  border: 3px solid var(--bad); border-radius: 3px; } .key.lost { border-style: dashed; }
.many { columns: 3 19rem; column-gap: 2.2rem; }
.row { display: grid; grid-template-columns: 8.5rem 1fr 7.2rem; gap: .8rem; align-items: center;
  padding: .16rem 0; break-inside: avoid; font-variant-numeric: tabular-nums; }
.row > :last-child { text-align: right; white-space: nowrap; }
.wide .row { grid-template-columns: 17rem 1fr 15rem; }
.two { display: grid; grid-template-columns: repeat(auto-fit, minmax(24rem, 1fr)); gap: 0 2.5rem; }
.two table { width: 100%; } .two .bar { min-width: 6rem; }
summary { cursor: pointer; margin: .8rem 0; color: var(--soft); }
code { font-size: .82rem; overflow-wrap: anywhere; }
@media (max-width: 46rem) { .wide .row { grid-template-columns: 1fr; gap: .2rem; } }
@media print { body { max-width: none; } .grid, .card, tr { break-inside: avoid; } }
"""
