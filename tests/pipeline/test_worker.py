"""What workers tell their driver."""

from __future__ import annotations

import logging
import threading
import time

from pipeline.worker import BusyClock, EncoderUse, collected_warnings


def test_time_inside_counts_once_for_all_threads() -> None:
    clock = BusyClock()
    assert clock.use() == EncoderUse() and EncoderUse().wait_share == 0

    def work() -> None:
        with clock:
            time.sleep(0.2)

    threads = [threading.Thread(target=work) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    time.sleep(0.2)
    work()
    use = clock.use()
    assert 0.39 < use.busy_s < 0.5 < 0.59 < use.span_s
    assert abs(use.wait_share - (1 - use.busy_s / use.span_s)) < 1e-9
    assert (use + use).busy_s == 2 * use.busy_s and (use + use).wait_share == use.wait_share


def test_warnings_of_this_thread() -> None:
    log = logging.getLogger("pipeline.anything")
    with collected_warnings() as messages:
        log.warning("one of %d", 2)
        log.info("not this")
        other = threading.Thread(target=log.warning, args=("another thread's",))
        other.start()
        other.join()
    log.warning("too late")
    assert messages == ["one of 2"]
