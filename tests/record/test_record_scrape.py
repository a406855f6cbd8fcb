"""Scrapes of an endpoint of Prometheus metrics: what the server counted between two of them is a step."""

import http.server
import threading

import numpy as np
import pytest

from moetrace import ReadOptions, SettingError, TraceError, read_trace
from moetrace.record.scrape import main, scrape

COUNTS = np.random.default_rng(0).integers(0, 50, (4, 2, 3))


@pytest.fixture
def exporter():
    """Counters that grow from scrape to scrape, beside other metrics; every third answer is an error."""
    totals, asked = COUNTS.cumsum(axis=0), []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            asked.append(self.path)
            if self.path == "/none":
                return self.answer("up 1\n")
            if len(asked) == 3:
                return self.send_error(503)
            now = totals[min(sum(1 for i, _ in enumerate(asked, 1) if i != 3), len(totals)) - 1]
            samples = "".join(
                f'expert_tokens_total{{layer="{layer}",expert="{expert}"}} {value}\n'
                for layer, own in enumerate(now)
                for expert, value in enumerate(own)
            )
            return self.answer(f"# TYPE expert_tokens_total counter\n# TYPE up gauge\nup 1\n{samples}")

        def answer(self, text):
            self.send_response(200)
            self.end_headers()
            self.wfile.write(text.encode())

        def log_message(self, *_):
            pass

    server = http.server.HTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    thread.join()
    server.server_close()


def test_scrapes_become_the_counts_between_them(exporter, tmp_path):
    """Each is appended whole; one that fails is told, and the next goes on."""
    told, waited = [], []
    done = scrape(f"{exporter}/metrics", tmp_path / "load.prom", 30, 4, wait=waited.append, tell=told.append)

    found = read_trace(tmp_path / "load.prom", options=ReadOptions(difference=True))

    assert (4, 1) == (done, len(told))
    assert "503" in told[0]
    assert all(0 < seconds <= 30 * (i + 1) for i, seconds in enumerate(waited))
    assert np.array_equal(COUNTS, found.counts)
    assert "up" not in (tmp_path / "load.prom").read_text().replace("expert", "")


def test_what_cannot_be_scraped_is_one_line(exporter, tmp_path, capsys):
    """No server, no such metrics, no address; nothing is written."""
    with pytest.raises(TraceError, match="has no metric with labels of a layer and an expert"):
        scrape(f"{exporter}/none", tmp_path / "x.prom")
    with pytest.raises(SettingError, match="is no address"):
        scrape("file:///etc/passwd", tmp_path / "x.prom")
    with pytest.raises(SettingError, match="above 0"):
        scrape(exporter, tmp_path / "x.prom", 0)

    assert 1 == main(["http://127.0.0.1:9/metrics", "-o", str(tmp_path / "x.prom")])
    assert "cannot be scraped" in capsys.readouterr().err
    assert not (tmp_path / "x.prom").exists()


def test_the_program_says_what_comes_next(exporter, tmp_path, capsys):
    """With the file that it wrote."""
    assert 0 == main([f"{exporter}/metrics", "--scrapes", "1", "-o", str(tmp_path / "y.prom")])

    assert f"1 scrapes in {tmp_path / 'y.prom'}; next: moetrace ingest" in capsys.readouterr().err
