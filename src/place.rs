//! Where threads run: a helper that slept on the caller's processor is sent to another one before it is woken.
//!
//! Left to itself, Linux may queue it behind the caller, although another processor is idle: the search for an idle one is skipped where the few
//! that share a cache were busy a moment ago. The help then comes a few milliseconds late, at every call, because both stay where they were.

use std::sync::atomic::{AtomicI32, AtomicUsize, Ordering};

/// What is known of one helper.
#[derive(Debug)]
pub struct Seat {
    /// Its number in the system; 0 before it has started.
    thread: AtomicI32,
    /// Where it was last.
    processor: AtomicUsize,
    /// Where it may not run, for our sake.
    kept_off: AtomicUsize,
}

/// Not known, or nowhere that matters.
const ELSEWHERE: usize = usize::MAX;

impl Default for Seat {
    fn default() -> Self {
        Self { thread: AtomicI32::new(0), processor: AtomicUsize::new(ELSEWHERE), kept_off: AtomicUsize::new(ELSEWHERE) }
    }
}

impl Seat {
    /// To be called by the helper when it starts.
    pub fn take(&self) {
        self.thread.store(system::thread(), Ordering::Relaxed);
    }

    /// To be called by the helper before it sleeps.
    pub fn leave(&self) {
        self.processor.store(system::processor().unwrap_or(ELSEWHERE), Ordering::Relaxed);
    }
}

/// To be called before helpers are woken: those that slept on this processor may run wherever they could, but for here.
pub fn make_way<'s>(seats: impl Iterator<Item = &'s Seat>) {
    let Some(here) = system::processor() else { return };
    for seat in seats {
        if seat.processor.compare_exchange(here, ELSEWHERE, Ordering::Relaxed, Ordering::Relaxed).is_ok() {
            let before = seat.kept_off.load(Ordering::Relaxed);
            if system::keep_off(seat.thread.load(Ordering::Relaxed), here, before) {
                seat.kept_off.store(here, Ordering::Relaxed);
            }
        }
    }
}

#[cfg(target_os = "linux")]
mod system {
    use core::mem::{size_of, zeroed};

    pub fn thread() -> i32 {
        // SAFETY: has no preconditions.
        unsafe { libc::gettid() }
    }

    pub fn processor() -> Option<usize> {
        // SAFETY: has no preconditions.
        usize::try_from(unsafe { libc::sched_getcpu() }).ok().filter(|&cpu| cpu < libc::CPU_SETSIZE as usize)
    }

    /// Takes a processor from those that a thread may run on, unless it is the only one, and gives one back, if the calling thread may run there.
    /// Failure changes nothing.
    pub fn keep_off(thread: i32, processor: usize, give_back: usize) -> bool {
        const SIZE: usize = size_of::<libc::cpu_set_t>();
        if thread == 0 {
            return false;
        }
        // SAFETY: sets of bits, for which zeros are valid; the calls get their size, and both numbers are checked to be inside.
        unsafe {
            let (mut own, mut allowed): (libc::cpu_set_t, libc::cpu_set_t) = (zeroed(), zeroed());
            if libc::sched_getaffinity(thread, SIZE, &raw mut allowed) != 0 || libc::sched_getaffinity(0, SIZE, &raw mut own) != 0 {
                return false;
            }
            if give_back < libc::CPU_SETSIZE as usize && libc::CPU_ISSET(give_back, &own) {
                libc::CPU_SET(give_back, &mut allowed);
            }
            if processor < libc::CPU_SETSIZE as usize {
                libc::CPU_CLR(processor, &mut allowed);
            }
            libc::CPU_COUNT(&allowed) > 0 && libc::sched_setaffinity(thread, SIZE, &raw const allowed) == 0
        }
    }
}

#[cfg(not(target_os = "linux"))]
mod system {
    pub fn thread() -> i32 {
        0
    }
    pub fn processor() -> Option<usize> {
        None
    }
    pub fn keep_off(_thread: i32, _processor: usize, _give_back: usize) -> bool {
        false
    }
}

#[cfg(all(test, target_os = "linux"))]
mod tests {
    use super::*;
    use std::sync::mpsc::channel;

    fn allowed() -> usize {
        std::thread::available_parallelism().map_or(1, usize::from)
    }

    #[test]
    fn a_helper_that_slept_here_wakes_elsewhere() {
        if allowed() < 2 {
            return;
        }
        let (call, called) = channel::<()>();
        let (answer, answered) = channel();
        let seat = Seat::default();
        std::thread::scope(|scope| {
            let seat = &seat;
            scope.spawn(move || {
                seat.take();
                while let Ok(()) = called.recv() {
                    answer.send(system::processor()).unwrap();
                }
            });
            call.send(()).unwrap();
            answered.recv().unwrap();
            let mut times = 0;
            for _ in 0..100 {
                // As if it had slept wherever the caller is.
                let here = system::processor().unwrap();
                seat.processor.store(here, Ordering::Relaxed);
                make_way(std::iter::once(seat));
                // Unless the caller has been moved meanwhile.
                let moved = seat.processor.load(Ordering::Relaxed) == ELSEWHERE;
                call.send(()).unwrap();
                let there = answered.recv().unwrap();
                assert!(!moved || there != Some(here));
                times += usize::from(moved);
            }
            drop(call);
            assert!(times > 0);
        });
    }

    /// What a thread may run on.
    fn processors(thread: i32) -> Vec<usize> {
        // SAFETY: as in `system::keep_off`.
        unsafe {
            let mut set: libc::cpu_set_t = core::mem::zeroed();
            assert_eq!(libc::sched_getaffinity(thread, size_of::<libc::cpu_set_t>(), &raw mut set), 0);
            (0..libc::CPU_SETSIZE as usize).filter(|&cpu| libc::CPU_ISSET(cpu, &set)).collect()
        }
    }

    #[test]
    fn a_helper_is_kept_off_one_processor_at_a_time() {
        let (end, ended) = channel::<()>();
        let seat = Seat::default();
        std::thread::scope(|scope| {
            let seat = &seat;
            let (ready, is_ready) = channel();
            scope.spawn(move || {
                seat.take();
                ready.send(()).unwrap();
                ended.recv().unwrap_err();
            });
            is_ready.recv().unwrap();
            let (thread, all) = (seat.thread.load(Ordering::Relaxed), processors(0));
            let mut last = ELSEWHERE;
            for &cpu in all.iter().chain(&all) {
                let done = system::keep_off(thread, cpu, last);
                assert_eq!(done, all.len() > 1);
                if done {
                    assert_eq!(processors(thread), all.iter().copied().filter(|&other| other != cpu).collect::<Vec<_>>());
                    last = cpu;
                }
            }
            drop(end);
        });
        assert!(!system::keep_off(0, 0, 0));
    }

    #[test]
    fn one_that_slept_elsewhere_is_left_alone() {
        let seat = Seat::default();
        make_way(std::iter::once(&seat));
        seat.processor.store(usize::MAX - 1, Ordering::Relaxed);
        make_way(std::iter::once(&seat));
        assert_eq!(seat.processor.load(Ordering::Relaxed), usize::MAX - 1);
        seat.leave();
        assert!(seat.processor.load(Ordering::Relaxed) < ELSEWHERE);
    }
}
