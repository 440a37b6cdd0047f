"""The benchmark with real guests: parsing fio's output, evaluating the runs, writing a Markdown file."""

from types import ModuleType

import pytest

from ringplane.bench.errors import BenchError

from . import benchmark

# fio 3.33: randrw, 4 KiB, depth 8, --unified_rw_reporting=1 --clat_percentiles=0 --lat_percentiles=1
PERCENTILES = (
    "1.000000%=8;5.000000%=8;10.000000%=9;20.000000%=9;30.000000%=9;40.000000%=9;50.000000%=10;60.000000%=10;"
    "70.000000%=10;80.000000%=10;90.000000%=10;95.000000%=10;99.000000%=12;99.500000%=18;99.900000%=95;"
    "99.950000%=108;99.990000%=132;0%=0;0%=0;0%=0"
)
LINE = (
    f"3;fio-3.33;x;0;0;1585348;3164367;791091;501;0;200;0.861981;1.250388;1;221;9.044750;4.278707;{PERCENTILES};"
    "2;222;9.906732;4.492052;0;0;0.000000%;0.000000;0.000000;35.600000%;63.600000%;5;0;10"
)


@pytest.fixture(scope="module")
def guests() -> ModuleType:
    return benchmark.load("guests")


def row(guests: ModuleType, subject: str, number: int, iops: float, strangers: float = 0.0):  # type: ignore[no-untyped-def]
    return guests.Row("uml", "tmpfs", "randread", 8, subject, number, iops, 4.0, 3.0, 9.0, 2.0, strangers)


def test_fio_line(guests: ModuleType) -> None:
    requests = 1585348 / 4
    assert guests.parse_fio(LINE, 4096) == guests.Fio(requests * 1000 / 501, requests, 9.906732, 10.0, 12.0)


@pytest.mark.parametrize(
    "line",
    [
        "",
        LINE[:100],
        LINE.replace("3;fio", "5;fio", 1),
        LINE.replace(";x;0;0;", ";x;0;5;"),
        LINE.replace(";1585348;", ";0;"),
        LINE.replace("50.000000%=10", "[   3.2] a message of the kernel"),
    ],
)
def test_lines_without_a_result_are_rejected(guests: ModuleType, line: str) -> None:
    with pytest.raises(ValueError, match=r"fio|convert"):
        guests.parse_fio(line, 4096)


def test_all_subjects_are_measured_equally_often_in_changing_order(guests: ModuleType) -> None:
    turns = guests.plan([("randread", 1), ("randwrite", 8)], 3, 3)
    assert [(turn.round, turn.subject) for turn in turns[:3]] == [(-1, 0), (-1, 1), (-1, 2)]
    counted = turns[3:]
    assert sorted((turn.round, turn.workload, turn.subject) for turn in counted) == sorted(
        (number, name, subject) for number in range(3) for name in ("randread", "randwrite") for subject in range(3)
    )
    assert {turn.subject for turn in counted[::3]} == {0, 1, 2}


def test_options_of_a_mixed_load(guests: ModuleType) -> None:
    assert guests.fio_options(guests.Turn(0, "randrw", 8, 0)) == "--rw=randrw --rwmixread=70 --bs=4096 --iodepth=8"
    assert guests.fio_options(guests.Turn(0, "seqwrite", 1, 0)) == "--rw=write --bs=65536 --iodepth=1"


def test_noisy_runs_count_only_if_there_are_no_others(guests: ModuleType) -> None:
    rows = [row(guests, "ringplane", number, iops, 0.0 if number else 1.5) for number, iops in enumerate((9, 1, 3))]
    rows += [row(guests, "qemu-storage-daemon native", number, iops, 1.0) for number, iops in enumerate((5, 6, 7))]
    cell = guests.summarize(rows)["uml", "tmpfs", False]["randread", 8]
    assert (cell["ringplane"]["iops"], cell["ringplane"]["counted"]) == (2, 2)
    assert (cell["qemu-storage-daemon native"]["iops"], cell["qemu-storage-daemon native"]["counted"]) == (6, 0)


def test_ratio_is_to_the_best_of_the_others_in_that_figure(guests: ModuleType) -> None:
    rows = [row(guests, "ringplane", 0, 8), row(guests, "qemu-storage-daemon native", 0, 10)]
    rows += [row(guests, "qemu-storage-daemon threads", 0, 16), row(guests, "ringplane --engine aio", 0, 99)]
    text = guests.markdown(rows, {"machine": "A machine", "rounds": 1, "seconds": 1.0})
    (line,) = [line for line in text.splitlines() if "| ringplane | 0.0 | 0.50 |" in line]
    assert line.count("1.00") == 4
    assert "qemu-storage-daemon native" not in text


def test_section_replaces_what_is_between_the_markers(guests: ModuleType) -> None:
    text = f"before\n{guests.BEGIN}\nold\n{guests.END}\nafter\n"
    assert guests.put_between_markers(text, "new\n") == f"before\n{guests.BEGIN}\n\nnew\n\n{guests.END}\nafter\n"


@pytest.mark.parametrize("text", ["", "{0}", "{1}{0}", "{0}{1}{0}{1}", "{0}{1}{1}"])
def test_file_without_the_markers_is_rejected(guests: ModuleType, text: str) -> None:
    with pytest.raises(BenchError, match="guests:begin"):
        guests.put_between_markers(text.format(guests.BEGIN, guests.END), "new")
