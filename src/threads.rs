//! The one door to rayon.
//!
//! The pool is private, started at the first call that wants it, and belongs to the process that started it: a forked child, in which the
//! workers do not exist, builds its own and leaves the inherited one alone. There is no lock, so a fork cannot copy a held one.

use std::sync::atomic::{AtomicPtr, AtomicUsize, Ordering};

struct Pool {
    process: u32,
    workers: usize,
    threads: rayon::ThreadPool,
}

static POOL: AtomicPtr<Pool> = AtomicPtr::new(core::ptr::null_mut());

/// A pool of at least `workers` threads, or none when threads cannot be had.
fn pool(workers: usize) -> Option<&'static rayon::ThreadPool> {
    let process = std::process::id();
    let current = POOL.load(Ordering::Acquire);
    // SAFETY: a pool, once published, is never freed.
    if let Some(known) = unsafe { current.as_ref() }
        && known.process == process
        && known.workers >= workers
    {
        return Some(&known.threads);
    }
    let pool = rayon::ThreadPoolBuilder::new().num_threads(workers).thread_name(|i| format!("crossent-{i}")).build().ok()?;
    let made = Box::into_raw(Box::new(Pool { process, workers, threads: pool }));
    if POOL.compare_exchange(current, made, Ordering::AcqRel, Ordering::Acquire).is_ok() {
        // A smaller pool of this process, or the parent's, stays behind: others may be using it.
        // SAFETY: just published, never freed.
        return Some(unsafe { &(*made).threads });
    }
    // SAFETY: not published, so this is the only pointer to it.
    drop(unsafe { Box::from_raw(made) });
    // SAFETY: a pool, once published, is never freed.
    unsafe { POOL.load(Ordering::Acquire).as_ref() }.map(|known| &known.threads)
}

/// Runs `task(0)`, …, `task(tasks - 1)`, each once, on at most `threads` threads, the calling one included.
pub fn for_each(threads: usize, tasks: usize, task: &(dyn Fn(usize) + Sync)) {
    let helpers = threads.min(tasks).saturating_sub(1);
    let Some(pool) = (if helpers > 0 { pool(helpers) } else { None }) else {
        return (0..tasks).for_each(task);
    };
    let next = AtomicUsize::new(0);
    let work = || {
        loop {
            let index = next.fetch_add(1, Ordering::Relaxed);
            if index >= tasks {
                break;
            }
            task(index);
        }
    };
    pool.in_place_scope(|scope| {
        for _ in 0..helpers {
            scope.spawn(|_| work());
        }
        work();
    });
}

/// CPUs this process may use: affinity and cgroup quota.
pub fn available() -> usize {
    std::thread::available_parallelism().map_or(1, usize::from)
}
