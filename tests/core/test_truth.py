"""The ground truth from each of its three sources, and what is refused."""

from __future__ import annotations

import pickle
import re
import sys
import types
from pathlib import Path

import pytest

import genas_plugins
from genas_plugins._compatibility import import_typeguard
from genas_plugins.nasbench201.truth import DATASETS, lookup, read_truth

HEADER = "arch,cifar10,cifar100,imagenet16_120"
# Three rows of the published benchmark.
TABLE = {
    "|avg_pool_3x3~0|+|nor_conv_1x1~0|skip_connect~1|+|nor_conv_1x1~0|skip_connect~1|skip_connect~2|": (
        *(85.8633, 52.9133, 26.6333),
    ),
    "|nor_conv_3x3~0|+|nor_conv_3x3~0|avg_pool_3x3~1|+|skip_connect~0|nor_conv_3x3~1|skip_connect~2|": (
        *(93.66, 70.2933, 44.0333),
    ),
    "|none~0|+|none~0|none~1|+|none~0|none~1|none~2|": (10.0, 1.0, 0.8333),
}
BEST = list(TABLE)[1]
LINE = f"{BEST},93.66,70.2933,44.0333"


def write(path: Path, *lines: str) -> Path:
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


@pytest.fixture
def table(tmp_path):
    return write(tmp_path / "truth.csv", HEADER, *(f"{arch},{a},{b},{c}" for arch, (a, b, c) in TABLE.items()))


@pytest.mark.parametrize(("column", "dataset"), list(enumerate(DATASETS)))
def test_csv(table, column, dataset):
    truth = read_truth(table, dataset)
    assert truth == {arch: accuracies[column] for arch, accuracies in TABLE.items()}
    assert list(truth) == list(TABLE)
    assert read_truth(str(table), dataset) == truth


def test_csv_as_spreadsheets_write_it(tmp_path):
    path = tmp_path / "truth.csv"
    path.write_bytes(f'\ufeff"rank","cifar10","arch"\r\n1,93.66,"{BEST}"\r\n\r\n'.encode())
    assert read_truth(path) == {BEST: 93.66}


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ([], "needs one column 'arch' in its first line; it has nothing"),
        (["arch,cifar100", f"{BEST},70"], "needs one column 'cifar10'.*'arch', 'cifar100'"),
        (["arch,cifar10,cifar10", f"{BEST},70,80"], "needs one column 'cifar10'"),
        ([HEADER], "holds no architecture"),
        ([HEADER, LINE.replace("avg_pool", "max_pool")], "line 2: .*Unknown operation 'max_pool_3x3'"),
        ([HEADER, LINE, "|none~0|+|none~0|none~1|,1,1,1"], "line 3: .*expected 3"),
        ([HEADER, LINE.replace("~2", "~1")], "line 2: .*expected an operation and ~2"),
        ([HEADER, LINE, LINE], "line 3: .*was there before"),
        ([HEADER, LINE.replace("93.66", "nan")], "line 2: the accuracy of .* is nan; expected percent"),
        ([HEADER, LINE.replace("93.66", "-0.5")], "is -0.5; expected percent"),
        ([HEADER, LINE.replace("93.66", "100.5")], "is 100.5; expected percent"),
        ([HEADER, LINE.replace("93.66", "0.9366")], "look like fractions"),
        ([HEADER, LINE.replace("93.66", "good")], "line 2: could not convert string to float: 'good'"),
        ([HEADER, f"{BEST},93.66"], "line 2: 2 values, but the header names 4 columns"),
        ([HEADER, f'{BEST},"93.66'], "not CSV: unexpected end of data"),
    ],
)
def test_csv_that_is_refused(tmp_path, lines, message):
    path = tmp_path / "truth.csv"
    path.write_text("\n".join(lines), encoding="utf-8")
    with pytest.raises(ValueError, match=message) as caught:
        read_truth(path)
    assert "truth.csv" in str(caught.value)


def test_file_that_is_not_text(tmp_path):
    path = tmp_path / "truth.csv"
    path.write_bytes(b"arch,cifar10\n\xff\xfe")
    with pytest.raises(ValueError, match=r"truth\.csv is not a CSV file in UTF-8"):
        read_truth(path)


def test_no_file_and_no_data_set(tmp_path, table):
    with pytest.raises(FileNotFoundError):
        read_truth(tmp_path / "nowhere.csv")
    with pytest.raises(ValueError, match=r"'mnist'.*cifar10, cifar100, imagenet16_120"):
        read_truth(table, "mnist")


def test_lookup_keeps_the_order_and_names_what_is_missing():
    truth = {"a": 1.0, "b": 2.0}
    assert lookup(truth, ["b", "a", "b"]) == [2.0, 1.0, 2.0]
    with pytest.raises(ValueError, match=r"no accuracy for 1 of 2 architectures: c\.$"):
        lookup(truth, iter("ac"))
    with pytest.raises(ValueError, match="no accuracy for 4 of 6 architectures: c, d, e and more"):
        lookup(truth, "abcdef")


@pytest.fixture
def nni_database(tmp_path, monkeypatch):
    """NNI's own tables, in a database of our own in place of the downloaded one."""
    pytest.importorskip("peewee", reason="peewee is not installed: pip install 'genas-plugins[nasbench201]'")
    import_typeguard()
    pytest.importorskip("nni", reason="NNI is not installed")
    sqlite = pytest.importorskip("playhouse.sqlite_ext")
    if not hasattr(sqlite, "SqliteExtDatabase"):
        pytest.skip("NNI 3.0 needs peewee 3")
    from nni.nas.benchmark.nasbench201 import Nb201TrialConfig, Nb201TrialStats, schema

    database = sqlite.SqliteExtDatabase(tmp_path / "nasbench201.db", autoconnect=True)
    monkeypatch.setattr(schema.proxy, "obj", None)
    schema.proxy.initialize(database)
    database.create_tables([Nb201TrialConfig, Nb201TrialStats])
    columns = [name for name in Nb201TrialStats._meta.sorted_field_names if name not in ("id", "config", "seed")]

    def add(cell, dataset, accuracies, epochs=200):
        config = Nb201TrialConfig.create(arch=cell, num_epochs=epochs, num_channels=16, num_cells=5, dataset=dataset)
        for seed, accuracy in enumerate(accuracies):
            Nb201TrialStats.create(config=config, seed=seed, **{**dict.fromkeys(columns, 5.0), "test_acc": accuracy})

    yield add
    database.close()


# The second and third architecture of the table in NNI's way to write them.
NNI_BEST = {"0_1": "conv_3x3", "0_2": "conv_3x3", "1_2": "avg_pool_3x3", "0_3": "skip_connect", "1_3": "conv_3x3"}
NNI_BEST["2_3"] = "skip_connect"
NNI_NONE = dict.fromkeys(NNI_BEST, "none")
NONE = list(TABLE)[2]


def test_nni(nni_database):
    nni_database(NNI_BEST, "cifar10", [93.0, 94.0, 95.0])
    nni_database(NNI_NONE, "cifar10", [10.0])
    nni_database(NNI_BEST, "imagenet16-120", [44.0, 45.0])
    # Not asked for: 12 epochs, and the half of CIFAR-10.
    nni_database(NNI_BEST, "cifar10", [60.0], epochs=12)
    nni_database(NNI_BEST, "cifar10-valid", [70.0])
    assert read_truth("nni") == {BEST: 94.0, NONE: 10.0}
    assert read_truth("nni", "imagenet16_120") == {BEST: 44.5}
    with pytest.raises(ValueError, match=r"NNI's .*database holds no architecture"):
        read_truth("nni", "cifar100")


def test_nni_cells_that_are_refused(nni_database):
    nni_database(NNI_BEST | {"0_1": "conv_5x5"}, "cifar10", [90.0])
    with pytest.raises(ValueError, match="'conv_5x5' is missing or unknown"):
        read_truth("nni")
    nni_database({"0_1": "none"}, "cifar100", [90.0])
    with pytest.raises(ValueError, match="'0_2' is missing or unknown"):
        read_truth("nni", "cifar100")


def test_nni_database_that_was_not_downloaded(nni_database, tmp_path, monkeypatch):
    from nni.nas.benchmark import utils
    from nni.nas.benchmark.nasbench201 import schema

    schema.proxy.obj = None
    monkeypatch.setattr(utils, "_loaded_benchmarks", {})
    monkeypatch.setattr(utils, "DATABASE_DIR", str(tmp_path))
    with pytest.raises(FileNotFoundError, match=r"download_benchmark\(\"nasbench201\"\)"):
        read_truth("nni")
    (tmp_path / "nasbench201-b2b60732.db").write_bytes(b"half of it")
    with pytest.raises(OSError, match="Invalid hash value"):
        read_truth("nni")


class FakeNats:
    """What NATS-Bench 1.8 returns for the topology space: the methods and keys that the reader may rely on."""

    keys = ("cifar10", "cifar100", "ImageNet16-120")

    def __len__(self):
        return len(TABLE)

    def arch(self, index):
        return list(TABLE)[index]

    def get_more_info(self, index, dataset, iepoch=None, hp="12", is_random=True):
        if index == 2 and dataset == "cifar100":
            raise AssertionError("invalid data path : 000002.pickle.pbz2")
        exact = TABLE[self.arch(index)][self.keys.index(dataset)]
        # A random seed's accuracy, or that after fewer epochs, is another.
        accuracy = exact if hp == "200" and iepoch is None and is_random is False else exact / 2
        return {"train-accuracy": 99.0, "valid-accuracy": 98.0, "test-accuracy": accuracy, "valtest-accuracy": 97.0}


@pytest.fixture
def nats_bench(monkeypatch):
    calls = []

    def create(file_path_or_dict, search_space, fast_mode=False, verbose=True):
        calls.append((file_path_or_dict, search_space, fast_mode, verbose))
        return FakeNats()

    module = types.ModuleType("nats_bench")
    module.create = create
    monkeypatch.setitem(sys.modules, "nats_bench", module)
    monkeypatch.setitem(sys.modules, "nats_bench.api_utils", types.ModuleType("nats_bench.api_utils"))
    sys.modules["nats_bench.api_utils"].pickle = pickle
    return calls


def test_nats_bench(nats_bench, tmp_path):
    truth = read_truth(tmp_path)
    assert truth == {arch: accuracies[0] for arch, accuracies in TABLE.items()}
    archive = str(tmp_path / "NATS-tss-v1_0-3ffb9.pickle.pbz2")
    assert read_truth(archive, "imagenet16_120")[BEST] == 44.0333
    # A folder is read in the API's fast mode, which refuses a file, and the other way round.
    assert nats_bench == [(str(tmp_path), "tss", True, False), (archive, "tss", False, False)]
    with pytest.raises(ValueError, match=r"architecture 2: no test accuracy on cifar100 after 200 epochs.*000002"):
        read_truth(tmp_path, "cifar100")


def test_nats_bench_itself(tmp_path):
    """The same with the real API, on an archive of two architectures."""
    api = pytest.importorskip("nats_bench", reason="NATS-Bench is not installed")

    def results(text, epochs, accuracies):
        found = api.ArchResults(0, text)
        for seed, accuracy in enumerate(accuracies):
            curve = dict.fromkeys(range(epochs), 50.0)
            trial = api.ResultsCount("x", None, curve, curve, 1.0, 1.0, {"arch_str": text}, seed, epochs, None)
            trial.update_OLD_eval("x-test", dict.fromkeys(range(epochs), 1.0) | {epochs - 1: accuracy}, curve)
            trial.update_OLD_eval("ori-test", curve, curve)
            found.update("cifar100", seed, trial)
        return found.state_dict()

    for index, (text, accuracies) in enumerate([(BEST, [70.0, 71.0]), (NONE, [1.5])]):
        content = {"12": results(text, 12, [33.0]), "200": results(text, 200, accuracies)}
        api.pickle_save(content, str(tmp_path / f"{index:06d}.pickle"))
    api.pickle_save({"meta_archs": [BEST, NONE]}, str(tmp_path / "meta.pickle"))
    assert read_truth(tmp_path, "cifar100") == {BEST: 70.5, NONE: 1.5}
    with pytest.raises(ValueError, match="architecture 0: no test accuracy on cifar10 "):
        read_truth(tmp_path)


MISSING = """
import sys
sys.modules.update(dict.fromkeys(sys.argv[1].split()))
from genas_plugins.nasbench201.truth import read_truth
try:
    read_truth(sys.argv[2])
except ImportError as error:
    print(error)
"""


@pytest.mark.parametrize(
    ("masked", "source", "sentence"),
    [
        ("nni", "nni", "nni is needed for NNI's NAS-Bench-201 database .*genas-plugins\\[nni\\]"),
        ("nats_bench", ".", "nats_bench is needed for a NATS-Bench archive .*genas-plugins\\[nasbench201\\]"),
    ],
)
def test_missing_package_is_a_sentence(masked, source, sentence, warm):
    root = Path(genas_plugins.__file__).parents[1]
    found = warm("torch")(MISSING, masked, source, folder=root)
    assert (found.status, found.stderr) == (0, "")
    assert len(found.stdout.splitlines()) == 1
    assert re.match(sentence, found.stdout)


@pytest.mark.parametrize("peewee", ["missing", "version 4"])
def test_peewee_that_nni_cannot_use_is_a_sentence(peewee, monkeypatch):
    monkeypatch.setitem(sys.modules, "nni", types.ModuleType("nni"))
    monkeypatch.setitem(sys.modules, "peewee", None if peewee == "missing" else types.ModuleType("peewee"))
    # Version 4 has no SqliteExtDatabase.
    for name in ("playhouse", "playhouse.sqlite_ext"):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    with pytest.raises(ImportError, match=r"peewee.*pip install 'genas-plugins\[nasbench201\]'"):
        read_truth("nni")
