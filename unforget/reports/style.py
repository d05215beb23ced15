"""The style sheet of the HTML page."""

from __future__ import annotations

STYLE = """
:root { color-scheme: light dark; --paper: #f7f6f3; --card: #fff; --ink: #22262b; --quiet: #666d75; --rule: #e3e1dc;
  --good: #2c7a51; --bad: #b23a31; --warn: #8f6400; --mark: #2f5f9e; --base: #8c929a; --wanted: #2c7a5114; }
@media (prefers-color-scheme: dark) { :root { --paper: #15171a; --card: #1c1f23; --ink: #e4e5e3; --quiet: #9aa1a9;
  --rule: #31353a; --good: #74c096; --bad: #ee8d83; --warn: #d8b268; --mark: #86b2ec; --base: #7f868e;
  --wanted: #74c0961c; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--paper); color: var(--ink); font: 15px/1.5 system-ui, "Segoe UI", Roboto,
  "Liberation Sans", "Helvetica Neue", Arial, sans-serif; overflow-wrap: anywhere; }
main { max-width: 1040px; margin: 0 auto; padding: 28px 20px 60px; }
h1 { font-size: 30px; line-height: 1.2; margin: 2px 0 8px; font-weight: 650; letter-spacing: -.01em; }
h2 { font-size: 19px; margin: 40px 0 12px; font-weight: 620; }
h3 { font-size: 15px; margin: 0; font-weight: 620; }
h4 { font-size: 13.5px; margin: 0; font-weight: 620; }
p { margin: 6px 0; max-width: 75ch; }
code { font: 13px/1.5 ui-monospace, "SF Mono", Menlo, Consolas, "DejaVu Sans Mono", monospace; }
a { color: inherit; }
.quiet, .over { color: var(--quiet); font-size: 13px; }
.over { margin: 0; }
.card { background: var(--card); border: 1px solid var(--rule); border-radius: 10px; padding: 18px 20px;
  margin: 0 0 16px; }
.banner { border-left: 6px solid var(--tone); padding: 20px 24px; }
.banner h1 span { color: var(--tone); }
.summary { font-size: 17px; max-width: none; }
.forgotten, .passed { --tone: var(--good); } .failed, .expired { --tone: var(--bad); }
.inconclusive, .allowed, .active { --tone: var(--warn); } .informational, .unused { --tone: var(--quiet); }
.pill { color: var(--tone); font-weight: 620; white-space: nowrap; }
nav { display: flex; flex-wrap: wrap; gap: 6px 20px; margin-top: 12px; font-size: 13.5px; }
nav a { text-decoration: none; } nav a:hover code { text-decoration: underline; }
.head { display: flex; flex-wrap: wrap; justify-content: space-between; gap: 2px 16px; align-items: baseline; }
.key { display: flex; flex-wrap: wrap; gap: 2px 18px; margin: 10px 0 4px; font-size: 13px; color: var(--quiet); }
.key svg { width: 30px; height: 12px; margin-right: 6px; vertical-align: -1px; }
.charts { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(300px, 100%), 1fr)); gap: 20px 32px;
  margin: 12px 0 10px; align-items: end; }
figure { margin: 0; min-width: 0; }
figcaption p, .draw p { margin: 0; max-width: none; } figure .quiet { font-variant-numeric: tabular-nums; }
.charts figure { max-width: 472px; } .charts figure.wide { grid-column: 1 / -1; max-width: none; }
svg { display: block; width: 100%; height: auto; overflow: visible; }
.key svg { display: inline-block; }
svg text { font-size: 11.5px; fill: var(--quiet); font-variant-numeric: tabular-nums; }
svg .limit { fill: var(--ink); }
.grid { stroke: var(--rule); stroke-width: 1; }
.threshold { stroke: var(--ink); stroke-width: 1.3; stroke-dasharray: 4 3; }
rect.wanted { fill: var(--wanted); } .trough { fill: var(--rule); opacity: .6; }
.curve { fill: none; stroke-width: 2; stroke-linejoin: round; } .whisker { stroke-width: 1.6; }
.curve.threshold { stroke-width: 1.3; }
.curve.base, .whisker.base { stroke: var(--base); } .curve.candidate, .whisker.candidate { stroke: var(--mark); }
.dot.base { fill: var(--card); stroke: var(--base); stroke-width: 2; }
.dot.candidate, .bar { fill: var(--mark); } .dot.failed, .bar.failed { fill: var(--bad); }
.dot { stroke: var(--card); stroke-width: 1; } .tick { stroke: var(--ink); stroke-width: 1.3; opacity: .55; }
.draw { display: grid; grid-template-columns: minmax(200px, 1fr) minmax(0, 472px); gap: 4px 32px; align-items: center;
  margin: 10px 0; }
.scroll { overflow-x: auto; } .scroll:focus-visible { outline: 2px solid var(--mark); }
table { border-collapse: collapse; width: 100%; font-size: 13.5px; font-variant-numeric: tabular-nums; }
th { text-align: left; font-weight: 560; color: var(--quiet); font-size: 12.5px; white-space: nowrap; }
th, td { padding: 5px 14px 5px 0; border-bottom: 1px solid var(--rule); vertical-align: top; }
tr:last-child td { border-bottom: 0; } td small { display: block; color: var(--quiet); }
td { overflow-wrap: normal; } td.text { min-width: 150px; overflow-wrap: anywhere; }
th.figure, td.figure { text-align: right; white-space: nowrap; }
details { margin-top: 10px; } summary { cursor: pointer; color: var(--quiet); font-size: 13.5px; padding: 3px 0; }
summary:hover { color: var(--ink); }
ul { margin: 0; padding-left: 20px; } li { margin: 4px 0; max-width: 85ch; }
.pictures { display: flex; flex-wrap: wrap; gap: 14px; margin-top: 10px; }
.pictures img { display: block; width: 112px; height: auto; border-radius: 3px; } .pictures figure { max-width: 112px; }
.pictures figcaption { color: var(--quiet); font-size: 12.5px; line-height: 1.35; margin-top: 4px; }
img.small { image-rendering: pixelated; }
footer { color: var(--quiet); font-size: 13px; margin-top: 36px; }
@media (max-width: 560px) { thead { display: none; } tbody tr { display: flex; flex-wrap: wrap; gap: 0 14px;
    padding: 7px 0; border-bottom: 1px solid var(--rule); } tbody tr:last-child { border-bottom: 0; }
  td { padding: 0; border: 0; } td.text { flex: 1 1 72%; } td.figure { text-align: left; }
  td.figure::before { content: attr(data-head) " "; color: var(--quiet); }
  td.figure small { display: inline; margin-left: 5px; }
  main { padding: 12px 12px 40px; } .card { padding: 14px; } h1 { font-size: 25px; }
  .summary { font-size: 16px; } }
@media (max-width: 720px) { .draw { grid-template-columns: minmax(0, 472px); margin: 12px 0; } }
@media print { :root { --paper: #fff; } body { font-size: 11pt; } main { max-width: none; padding: 0; }
  figure, tr, .draw, .banner { break-inside: avoid; } h2, h3 { break-after: avoid; } .scroll { overflow: visible; }
  details::details-content { content-visibility: visible; block-size: auto; } * { print-color-adjust: exact; } }
"""
