//! The one door to rayon.
//!
//! The pool is private, started at the first call that wants it, and belongs to the process that started it: a forked child, in which the
//! workers do not exist, builds its own and leaves the inherited one alone. There is no lock, so a fork cannot copy a held one.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicPtr, AtomicUsize, Ordering};

use crate::place::{Seat, make_way};

struct Pool {
    process: u32,
    seats: Box<[Seat]>,
    threads: rayon::ThreadPool,
}

impl Pool {
    /// Has threads do something, one each.
    fn call(&'static self, threads: usize, job: impl Fn() + Clone + Send + 'static) {
        make_way(self.seats.iter());
        for _ in 0..threads {
            let job = job.clone();
            self.threads.spawn(move || {
                job();
                if let Some(seat) = rayon::current_thread_index().and_then(|index| self.seats.get(index)) {
                    seat.leave();
                }
            });
        }
    }
}

static POOL: AtomicPtr<Pool> = AtomicPtr::new(core::ptr::null_mut());

/// A pool of at least `workers` threads, or none when threads cannot be had.
fn pool(workers: usize) -> Option<&'static Pool> {
    let process = std::process::id();
    let current = POOL.load(Ordering::Acquire);
    // SAFETY: a pool, once published, is never freed.
    if let Some(known) = unsafe { current.as_ref() }
        && known.process == process
        && known.seats.len() >= workers
    {
        return Some(known);
    }
    let threads = rayon::ThreadPoolBuilder::new().num_threads(workers).thread_name(|i| format!("crossent-{i}")).build().ok()?;
    // Until each has started: what the C library allocates for a thread's start, it aborts for when it cannot be had any more.
    let seats: Box<[Seat]> = (0..workers).map(|_| Seat::default()).collect();
    threads.broadcast(|thread| seats[thread.index()].take());
    let made = Box::into_raw(Box::new(Pool { process, seats, threads }));
    if POOL.compare_exchange(current, made, Ordering::AcqRel, Ordering::Acquire).is_ok() {
        // A smaller pool of this process, or the parent's, stays behind: others may be using it.
        // SAFETY: just published, never freed.
        return Some(unsafe { &*made });
    }
    // SAFETY: not published, so this is the only pointer to it.
    drop(unsafe { Box::from_raw(made) });
    // SAFETY: a pool, once published, is never freed.
    unsafe { POOL.load(Ordering::Acquire).as_ref() }
}

/// One call's work. Helpers hold it by reference count: one that comes too late finds it closed and leaves, so that nobody waits for a thread that
/// the system has not let run yet.
struct Region {
    /// The caller's closure; valid until the caller has closed the region and nobody is inside.
    task: *const (dyn Fn(usize) + Sync),
    tasks: usize,
    next: AtomicUsize,
    /// Helpers inside, and [`CLOSED`].
    inside: AtomicUsize,
    panicked: AtomicBool,
}

/// No helper may enter any more.
const CLOSED: usize = 1 << (usize::BITS - 1);

// SAFETY: the closure behind the pointer is Sync, and the rest are atomics.
unsafe impl Send for Region {}
// SAFETY: as above.
unsafe impl Sync for Region {}

impl Region {
    fn work(&self, task: &(dyn Fn(usize) + Sync)) {
        loop {
            let index = self.next.fetch_add(1, Ordering::Relaxed);
            if index >= self.tasks {
                break;
            }
            task(index);
        }
    }

    /// What a helper does.
    fn help(&self) {
        if self.inside.fetch_add(1, Ordering::Acquire) & CLOSED == 0 {
            // SAFETY: entered before it was closed, so the caller waits for this helper to leave before the closure dies.
            let task = unsafe { &*self.task };
            if catch_unwind(AssertUnwindSafe(|| self.work(task))).is_err() {
                self.panicked.store(true, Ordering::Relaxed);
            }
        }
        self.inside.fetch_sub(1, Ordering::Release);
    }
}

/// Closes a region and waits for those inside, also when the caller's own share panics.
struct Close<'r>(&'r Region);

impl Drop for Close<'_> {
    fn drop(&mut self) {
        self.0.inside.fetch_or(CLOSED, Ordering::AcqRel);
        let mut turns = 0_u32;
        while self.0.inside.load(Ordering::Acquire) != CLOSED {
            // They are at their last task: soon done, unless the system has taken their processor.
            if turns < 2000 {
                core::hint::spin_loop();
            } else {
                std::thread::yield_now();
            }
            turns = turns.saturating_add(1);
        }
    }
}

/// Threads that have been called and wait for work, for a while.
pub struct Awake(Arc<AtomicBool>);

impl Drop for Awake {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
    }
}

/// How long a thread that has been called waits for work, turning: about a tenth of a millisecond. It takes half of that to wake one.
const PATIENCE: usize = 1 << 11;

/// Calls the threads that [`for_each`] is about to need, so that they wake while the caller prepares the work; to be dropped before that.
pub fn wake(threads: usize) -> Option<Awake> {
    let helpers = threads.saturating_sub(1);
    let pool = if helpers > 0 { pool(helpers) } else { None }?;
    let called = Awake(Arc::new(AtomicBool::new(false)));
    let released = Arc::clone(&called.0);
    pool.call(helpers, move || {
        for _ in 0..PATIENCE {
            if released.load(Ordering::Relaxed) {
                break;
            }
            core::hint::spin_loop();
        }
    });
    Some(called)
}

/// Runs `task(0)`, …, `task(tasks - 1)`, each once, on at most `threads` threads, the calling one included.
pub fn for_each(threads: usize, tasks: usize, task: &(dyn Fn(usize) + Sync)) {
    let helpers = threads.min(tasks).saturating_sub(1);
    let Some(pool) = (if helpers > 0 { pool(helpers) } else { None }) else {
        return (0..tasks).for_each(task);
    };
    #[allow(clippy::transmute_ptr_to_ptr)] // a cast cannot change the lifetime in a trait object
    // SAFETY: only the lifetime changes; `Region::task` says until when it is used.
    let forever = unsafe { core::mem::transmute::<*const (dyn Fn(usize) + Sync + '_), *const (dyn Fn(usize) + Sync + 'static)>(task) };
    let region =
        Arc::new(Region { task: forever, tasks, next: AtomicUsize::new(0), inside: AtomicUsize::new(0), panicked: AtomicBool::new(false) });
    let shared = Arc::clone(&region);
    pool.call(helpers, move || shared.help());
    {
        let _close = Close(&region);
        region.work(task);
    }
    assert!(!region.panicked.load(Ordering::Relaxed), "a task panicked");
}

/// CPUs this process may use: affinity and cgroup quota.
pub fn available() -> usize {
    std::thread::available_parallelism().map_or(1, usize::from)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_task_runs_once_whoever_comes() {
        for round in 0..200 {
            let counts: Vec<AtomicUsize> = (0..round % 37).map(|_| AtomicUsize::new(0)).collect();
            for_each(1 + round % 5, counts.len(), &|i| {
                counts[i].fetch_add(1, Ordering::Relaxed);
            });
            assert!(counts.iter().all(|count| count.load(Ordering::Relaxed) == 1));
        }
    }

    #[test]
    fn threads_that_were_called_do_the_work() {
        assert!(wake(0).is_none() && wake(1).is_none());
        for round in 0..50 {
            let awake = wake(3);
            assert!(awake.is_some());
            if round % 2 == 0 {
                drop(awake);
            }
            let count = AtomicUsize::new(0);
            for_each(3, 20, &|_| {
                count.fetch_add(1, Ordering::Relaxed);
            });
            assert_eq!(count.load(Ordering::Relaxed), 20);
        }
    }

    #[test]
    fn a_panic_in_any_share_reaches_the_caller() {
        for bad in 0..8 {
            let result = catch_unwind(AssertUnwindSafe(|| for_each(3, 8, &|i| assert!(i != bad))));
            assert!(result.is_err());
        }
        for_each(3, 8, &|_| {});
    }
}
