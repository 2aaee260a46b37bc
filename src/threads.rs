//! The one door to rayon.
//!
//! The pool is private, started at the first call that wants it, and belongs to the process that started it: a forked child, in which the
//! workers do not exist, builds its own and leaves the inherited one alone, with whatever lock was held.

use std::collections::VecDeque;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::{AtomicBool, AtomicPtr, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};

use crate::place::{Seat, make_way};

/// What a helper is called for.
type Work = Arc<dyn Fn() + Send + Sync>;

struct Pool {
    process: u32,
    seats: Box<[Seat]>,
    threads: rayon::ThreadPool,
    /// What no helper has taken yet, and how much that is.
    queue: Mutex<VecDeque<Work>>,
    pending: AtomicUsize,
    /// Helpers that turn until there is more to do.
    waiting: AtomicUsize,
    /// Callers that are about to have something, and those whose work is being done.
    announced: AtomicUsize,
    active: AtomicUsize,
}

/// How long a helper turns before it sleeps: about a tenth of a millisecond. It takes half of that to wake one.
const PATIENCE: usize = 1 << 11;

impl Pool {
    /// Has helpers do something, one each.
    fn call(&'static self, helpers: usize, work: &Work) {
        let Ok(mut queue) = self.queue.lock() else { return };
        queue.extend((0..helpers).map(|_| Arc::clone(work)));
        let pending = queue.len();
        self.pending.store(pending, Ordering::SeqCst);
        drop(queue);
        self.wake(helpers.min(pending.saturating_sub(self.waiting.load(Ordering::SeqCst))));
    }

    /// Wakes helpers that sleep.
    fn wake(&'static self, helpers: usize) {
        if helpers == 0 {
            return;
        }
        make_way(self.seats.iter());
        for _ in 0..helpers {
            self.threads.spawn(move || {
                self.serve();
                if let Some(seat) = rayon::current_thread_index().and_then(|index| self.seats.get(index)) {
                    seat.leave();
                }
            });
        }
    }

    /// What a helper does while it is awake.
    fn serve(&self) {
        let mut worked = false;
        loop {
            while let Some(work) = self.take() {
                work();
                worked = true;
            }
            self.waiting.fetch_add(1, Ordering::SeqCst);
            let mut turns = 0;
            // Where several callers share the processors a helper that only turns is in their way.
            while turns < PATIENCE
                && self.pending.load(Ordering::Relaxed) == 0
                && self.active.load(Ordering::Relaxed) < 2
                && (worked || self.announced.load(Ordering::Relaxed) == 1)
            {
                core::hint::spin_loop();
                turns += 1;
            }
            self.waiting.fetch_sub(1, Ordering::SeqCst);
            // A caller who counted on this helper has put the work there before it looked.
            if self.pending.load(Ordering::SeqCst) == 0 {
                return;
            }
        }
    }

    fn take(&self) -> Option<Work> {
        if self.pending.load(Ordering::SeqCst) == 0 {
            return None;
        }
        let mut queue = self.queue.lock().ok()?;
        let work = queue.pop_front();
        self.pending.store(queue.len(), Ordering::SeqCst);
        work
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
    let [pending, waiting, announced, active] = [0; 4].map(AtomicUsize::new);
    let queue = Mutex::new(VecDeque::with_capacity(2 * workers));
    let made = Box::into_raw(Box::new(Pool { process, seats, threads, queue, pending, waiting, announced, active }));
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
struct Close<'r>(&'r Region, &'static Pool);

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
        self.1.active.fetch_sub(1, Ordering::Relaxed);
    }
}

/// Helpers that turn until there is work, for a while.
pub struct Awake(&'static Pool);

impl Drop for Awake {
    fn drop(&mut self) {
        self.0.announced.fetch_sub(1, Ordering::Relaxed);
    }
}

/// Calls the threads that [`for_each`] is about to need, so that they wake while the caller prepares the work; to be dropped after that.
pub fn wake(threads: usize) -> Option<Awake> {
    let helpers = threads.saturating_sub(1);
    let pool = if helpers > 0 { pool(helpers) } else { None }?;
    pool.announced.fetch_add(1, Ordering::Relaxed);
    pool.wake(helpers.saturating_sub(pool.waiting.load(Ordering::SeqCst)));
    Some(Awake(pool))
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
    let work: Work = Arc::new(move || shared.help());
    {
        let _close = Close(&region, pool);
        pool.active.fetch_add(1, Ordering::Relaxed);
        pool.call(helpers, &work);
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
