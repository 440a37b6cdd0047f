"""Measurements of vhost-user-blk back ends, side by side: `ringplane bench` for use from Python.

`cells` defines the workloads, `places` the locations of the images, `backends` the programs. `run` measures them in
interleaved rounds and fills a `results.Report`. `summary` computes medians and ratios; `console_tables`, `markdown` and
`plots` show them:

    from ringplane.bench import backends, cells, machine, places, qsd, results, run, summary

    settings = run.Settings(cells=cells.table(["randread"], [1, 32], [1], ["event"]), seconds=0.5)
    subjects = [backends.ringplane(), qsd.subject("native")]
    report = results.Report(machine.describe(), settings.described(), subjects=subjects)
    run.Bench(settings, report).place(places.parse("/dev/shm"), subjects)
    for at in summary.compare(report):
        print(at, at.figures.iops, at.ratio("iops"))
"""
