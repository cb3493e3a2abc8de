# SPDX-License-Identifier: MIT
"""Benchmarks: what a model is asked, and how its answers and pictures are judged.

Each is a module with the same five names, so that the command line needs no word about it:

    TITLE, SUMMARY  its name for a report, and one line for --help
    OPTIONS         {"generate": (runner.Option, …), "score": (…), "report": (…)}: its own options
    read(data, …)   the items; ValueError with file, line and what would be right
    generate(settings: runner.Settings, out, **options) -> runner.Coverage
    score(run, progress=True, **options) -> the content of score.json (`report.write_score`)
    report(run, **options) -> the paths written (`report.write_report`)

Options arrive under their flags' names, underscores for dashes. Importing such a module must stay cheap: models and
the pipeline are imported by the functions that need them.
"""

MODULES = {  # name on the command line -> module in this package
    "geneval": "geneval",
    "dpg_bench": "dpg_bench",
    "wise": "wise",
    "uni_mmmu": "uni_mmmu",
    "tiny": "tiny.bench",
}
