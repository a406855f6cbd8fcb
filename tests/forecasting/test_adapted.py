"""Forecasters of other libraries: each interface, each expert a series, and when a result may be cached."""

import numpy as np
import pytest

import moetrace as mt
from moetrace.forecasting.keys import settings_of
from moetrace.forecasting.predictors import label

TRACE = mt.synthetic_trace([mt.settling(500, steps=3000), mt.settling(900, steps=3000)], name="run")
SCORES = ["predictor", "layer", "cutoff", "error_rate", "status"]


class Mean:
    """As scikit-learn has it: parameters by name, what is learned beside them."""

    def __init__(self, last=50, weights=None):
        self.last, self.weights = last, weights

    def get_params(self, deep=True):
        return {"last": self.last, "weights": self.weights}

    def fit(self, y):
        self.mean_ = y.iloc[-self.last :].mean()
        return self

    def predict(self, fh):
        return np.full((len(fh), 1), self.mean_)


class Told(Mean):
    """As those of sktime that have to know the horizon when they are fitted."""

    def fit(self, y, X=None, fh=None):
        assert fh.tolist() == list(range(1, len(fh) + 1))
        return super().fit(y)


class Nixtla:
    """As a model of statsforecast, whose parameters are its attributes."""

    def __init__(self, last=50):
        self.last = last

    def predict(self, h):
        raise AssertionError("fits no copy")

    def forecast(self, y, h, X=None):
        return {"mean": np.full(h, y[-self.last :].mean(), np.float32)}


class Failing(Mean):
    """Fails for the busiest experts."""

    def __init__(self, how="raises"):
        self.how = how

    def get_params(self, deep=True):
        return {"how": self.how}

    def fit(self, y):
        self.fails = y.mean() > 1.2
        if self.fails and self.how == "raises":
            raise RuntimeError("does not converge")
        self.mean_ = y.mean()

    def predict(self, fh):
        made = np.full(len(fh), self.mean_)
        return {"shape": made[1:], "far": 1e6 * made, "nan": np.nan * made}[self.how] if self.fails else made


@pytest.mark.parametrize("kind", [Mean, Told, Nixtla])
@pytest.mark.slow
def test_a_forecaster_is_a_predictor(kind):
    """It keeps what every predictor has to, and the mean of all blocks is the mean of the window that they make."""
    made = mt.from_forecaster(kind(), block=20, history=1000)
    found, expected = (mt.predict(TRACE, 500, predictor=[own]).frame("means")["share"] for own in (made, "window_mean"))

    mt.check_predictor(made)
    assert (kind.__name__, f"{kind.__name__}:block=20:history=1000") == (made.name, label(made))
    assert np.allclose(expected, found, atol=1e-6)


def test_each_expert_is_a_series_in_mean_loads():
    """The mean over experts is 1, in blocks of steps, as many as the horizon has."""
    seen = []

    class Seen(Mean):
        def fit(self, y):
            seen.append(y.to_numpy())
            return super().fit(y)

        def predict(self, fh):
            assert fh.tolist() == [1, 2, 3]
            return super().predict(fh)

    layer = TRACE.layer(0)
    mt.from_forecaster(Seen(), block=50, history=2000).forecast(layer, 120)

    assert [(40,)] * layer.experts == [series.shape for series in seen]
    assert np.allclose(1, np.mean(seen, axis=0))
    assert np.isclose(layer.experts * layer.shares[-50:, 3].mean(), seen[3][-1])


@pytest.mark.parametrize(
    ("how", "said"), [("raises", "RuntimeError"), ("shape", "shape"), ("far", "diverged"), ("nan", "diverged")]
)
def test_an_expert_that_fails_keeps_its_mean(how, said):
    """And the status has how many, and why."""
    layer = TRACE.layer(0)
    busy = layer.last(2500).mean_shares > 1.2 / layer.experts
    found = mt.from_forecaster(Failing(how)).forecast(layer, 100)

    assert 2 == busy.sum()
    assert f"fallback:window_mean:2/{layer.experts}:{said}" == found.status
    assert np.allclose(layer.last(1000).mean_shares[busy], found.shares[0, busy])


@pytest.mark.thorough
def test_it_is_scored_beside_ours_by_many_processes(tmp_path):
    """With the same result as by one, and cached by its parameters."""
    asked = {"horizon": 500, "workspace": tmp_path}
    one = mt.predict(TRACE, predictor=["window_mean", mt.from_forecaster(Mean(20), "mean")], horizon=500)
    many = mt.predict(TRACE, predictor=["window_mean", mt.from_forecaster(Mean(20), "mean")], jobs=2, **asked)
    again = mt.predict(TRACE, predictor=[mt.from_forecaster(Mean(20), "mean")], **asked)
    other = mt.predict(TRACE, predictor=[mt.from_forecaster(Mean(5), "mean")], **asked)

    assert one.frame("scores")[SCORES].equals(many.frame("scores")[SCORES])
    assert {"window_mean", "mean"} == set(many.frame("scores")["predictor"])
    assert (0, 0) == (again.computed, other.reused)
    assert not many.frame("scores").tail(5)["error_rate"].equals(other.frame("scores").tail(5)["error_rate"])


def known(forecaster, **settings):
    """What the key of a result has of it."""
    return settings_of(mt.from_forecaster(forecaster, "mine", **settings))


def test_results_are_known_again_by_class_and_parameters():
    """Of a forecaster and of those within it; what cannot be told is another each time."""
    assert known(Mean(20)) == known(Mean(20))
    assert known(Mean(Mean(np.float64(2)))) == known(Mean(Mean(2.0)))
    assert known(Nixtla(20)) == known(Nixtla(20))
    others = [
        Mean(21),
        Told(20),
        Mean(Mean(3.0)),
        Nixtla(21),
        Mean(20, [1, 2]),
        Mean(20, {"a": None}),
        Mean(20, (True,)),
    ]
    assert len(others) + 1 == len({str(known(own)) for own in (Mean(20), *others)})
    for odd in (np.ones(3), max, object(), [np.mean]):
        made = mt.from_forecaster(Mean(20, odd), "mine")
        assert settings_of(made) == settings_of(made) != known(Mean(20, odd))
    assert known(Mean(20)) != known(Mean(20), block=10)


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        (lambda: mt.from_forecaster(Mean), r"Mean is a class: Mean\(\) makes a forecaster"),
        (lambda: mt.from_forecaster("naive"), r"str is no forecaster: it needs fit\(y\) and predict\(fh\)"),
        (lambda: mt.from_forecaster(Mean(), "level"), "level is a predictor of moetrace"),
        (lambda: mt.from_forecaster(Mean(), "a:b"), "'a:b' is no name: it has letters"),
        (lambda: mt.from_forecaster(Mean(), block=0), "1 or more, not 0 and 2500"),
        (lambda: mt.predict(TRACE, predictor=2 * [mt.from_forecaster(Mean())]), "Mean is given twice"),
    ],
)
def test_what_is_no_forecaster_is_refused(wrong, said):
    """In a sentence."""
    with pytest.raises(mt.SettingError, match=said):
        wrong()


def test_one_made_in_a_module_at_hand_has_a_name_on_the_command_line(tmp_path, monkeypatch):
    """With settings of the adapter, and none that no text can give."""
    (tmp_path / "mine.py").write_text(
        "import moetrace as mt\nclass Last:\n    def fit(self, y):\n        self.last = y.iloc[-1]\n"
        "    def predict(self, fh):\n        return [self.last] * len(fh)\nlast = mt.from_forecaster(Last(), 'last')\n"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)

    assert "last:block=10" == label(mt.predictor("mine:last:block=10"))
    with pytest.raises(mt.SettingError, match="last has no setting 'forecaster'; it has block, history"):
        mt.predictor("mine:last:forecaster=x")
