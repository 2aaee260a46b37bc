//! Recycled memory for large results.
//!
//! The first touch of fresh pages costs more than most of the work this crate does, so the buffer of a large result that dies is kept for the
//! next one of about its size. A [`Buffer`] owns its memory alone from [`Buffer::new`] to its drop; only then can somebody else get it. Nothing is
//! ever cleared.
//!
//! The kept buffers belong to a shelf keyed by process id: a forked child starts its own, because the parent's lock may have been held by
//! a thread that does not exist in the child. Locks are held for list operations only, never for system calls.

use core::ptr::NonNull;
use core::sync::atomic::{AtomicPtr, AtomicUsize, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};

/// Results of at least this many bytes are worth recycling; below, the allocator of the caller is as good.
pub const RECYCLE_FROM: usize = 1 << 20;
/// Bytes kept at most, unless [`set_limit`] says otherwise.
pub const DEFAULT_LIMIT: usize = 512 << 20;
/// Capacities are multiples of this, so that results of nearly one size share buffers.
const GRANULE: usize = 1 << 16;
/// Buffers from here on start on a huge page, which the system is asked for.
const HUGE_FROM: usize = 1 << 22;
/// The size of a huge page on x86-64 and on `AArch64` with 4 KiB pages.
const HUGE_PAGE: usize = 1 << 21;

static LIMIT: AtomicUsize = AtomicUsize::new(DEFAULT_LIMIT);
static POOL: AtomicPtr<Pool> = AtomicPtr::new(core::ptr::null_mut());

/// Memory for one result, aligned to a page, contents arbitrary. Dropping it keeps the memory for the next one or frees it.
#[derive(Debug)]
pub struct Buffer {
    block: Option<Block>,
}

impl Buffer {
    /// At least `bytes` bytes, or `None` when the system has none.
    pub fn new(bytes: usize) -> Option<Self> {
        let capacity = bytes.max(1).checked_next_multiple_of(GRANULE)?;
        if isize::try_from(capacity).is_err() {
            return None;
        }
        // A statement of its own: the lock must be gone before the system is asked, and before `clear` takes it again.
        let kept = pool().lock().take(capacity);
        let block = match kept {
            Some(block) => block,
            // Out of address space or over a limit: what is kept for later is worth less than this result.
            None => Block::map(capacity).or_else(|| {
                clear();
                Block::map(capacity)
            })?,
        };
        Some(Self { block: Some(block) })
    }

    /// The first byte.
    pub fn as_ptr(&self) -> *mut u8 {
        self.block.as_ref().map_or(core::ptr::null_mut(), |block| block.ptr.as_ptr())
    }

    /// Bytes at [`Buffer::as_ptr`].
    #[cfg(test)]
    fn capacity(&self) -> usize {
        self.block.as_ref().map_or(0, |block| block.capacity)
    }
}

impl Drop for Buffer {
    fn drop(&mut self) {
        let Some(block) = self.block.take() else { return };
        let evicted = pool().lock().put(block, limit());
        // Unmapped after the lock is gone: giving back a large buffer takes long.
        drop(evicted);
    }
}

/// The most bytes that are kept.
pub fn limit() -> usize {
    LIMIT.load(Ordering::Relaxed)
}

/// Sets the most bytes that are kept, 0 for none, and frees what is above it.
pub fn set_limit(bytes: usize) {
    LIMIT.store(bytes, Ordering::Relaxed);
    let evicted = pool().lock().shrink(bytes);
    drop(evicted);
}

/// Frees everything that is kept.
pub fn clear() {
    let evicted = pool().lock().shrink(0);
    drop(evicted);
}

/// Bytes kept now.
pub fn kept() -> usize {
    pool().lock().bytes
}

/// Mapped memory. Dropping it gives it back to the system.
#[derive(Debug)]
struct Block {
    ptr: NonNull<u8>,
    capacity: usize,
}

// SAFETY: a Block owns its memory; nothing about it belongs to a thread.
unsafe impl Send for Block {}
// SAFETY: as above; a shared Block only tells its address and size.
unsafe impl Sync for Block {}

#[cfg(unix)]
impl Block {
    fn map(capacity: usize) -> Option<Self> {
        // Huge pages need their alignment, which older systems do not give to large maps by themselves: map one more and trim both ends.
        let slack = if capacity >= HUGE_FROM { HUGE_PAGE } else { 0 };
        let length = capacity.checked_add(slack)?;
        // SAFETY: a fresh private anonymous map touches no existing memory.
        let base = unsafe {
            libc::mmap(core::ptr::null_mut(), length, libc::PROT_READ | libc::PROT_WRITE, libc::MAP_PRIVATE | libc::MAP_ANONYMOUS, -1, 0)
        };
        if base == libc::MAP_FAILED {
            return None;
        }
        let base = base.cast::<u8>();
        let head = if slack == 0 { 0 } else { base.align_offset(HUGE_PAGE).min(slack) };
        // SAFETY: head <= slack, so head + capacity <= length: both trims lie in the map made above, outside the part that is kept, and start on
        // pages (maps do, HUGE_PAGE and GRANULE are multiples of any page up to 64 KiB). A failed trim only leaves address space unused.
        let ptr = unsafe {
            if head > 0 {
                libc::munmap(base.cast(), head);
            }
            if slack > head {
                libc::munmap(base.add(head + capacity).cast(), slack - head);
            }
            base.add(head)
        };
        #[cfg(target_os = "linux")]
        if slack > 0 {
            // SAFETY: advice about memory mapped above; a refusal changes nothing.
            unsafe { libc::madvise(ptr.cast(), capacity, libc::MADV_HUGEPAGE) };
        }
        NonNull::new(ptr).map(|ptr| Self { ptr, capacity })
    }
}

#[cfg(unix)]
impl Drop for Block {
    fn drop(&mut self) {
        // SAFETY: ptr and capacity are what `map` kept of its map, and nobody else has them.
        unsafe { libc::munmap(self.ptr.as_ptr().cast(), self.capacity) };
    }
}

#[cfg(not(unix))]
impl Block {
    fn layout(capacity: usize) -> Option<std::alloc::Layout> {
        std::alloc::Layout::from_size_align(capacity, if capacity >= HUGE_FROM { HUGE_PAGE } else { GRANULE }).ok()
    }

    fn map(capacity: usize) -> Option<Self> {
        // SAFETY: the capacity is not zero (`Buffer::new` rounds up to a granule).
        let ptr = unsafe { std::alloc::alloc(Self::layout(capacity)?) };
        NonNull::new(ptr).map(|ptr| Self { ptr, capacity })
    }
}

#[cfg(not(unix))]
impl Drop for Block {
    fn drop(&mut self) {
        if let Some(layout) = Self::layout(self.capacity) {
            // SAFETY: allocated by `map` with this layout.
            unsafe { std::alloc::dealloc(self.ptr.as_ptr(), layout) };
        }
    }
}

/// The buffers kept for later, oldest first.
#[derive(Debug, Default)]
struct Shelf {
    blocks: Vec<Block>,
    bytes: usize,
}

impl Shelf {
    /// The smallest block that holds `capacity` and wastes at most a quarter of it; the youngest of equals, whose pages are warmest.
    fn take(&mut self, capacity: usize) -> Option<Block> {
        let most = capacity + capacity / 4;
        let fits = |block: &Block| (capacity..=most).contains(&block.capacity);
        let best = self.blocks.iter().enumerate().rev().filter(|(_, block)| fits(block)).min_by_key(|(_, block)| block.capacity)?.0;
        let block = self.blocks.remove(best);
        self.bytes -= block.capacity;
        Some(block)
    }

    /// Keeps `block` as the youngest; returns what has to go, which may be the block itself.
    fn put(&mut self, block: Block, limit: usize) -> Vec<Block> {
        if block.capacity > limit {
            return vec![block];
        }
        let evicted = self.shrink(limit - block.capacity);
        self.bytes += block.capacity;
        self.blocks.push(block);
        evicted
    }

    /// Removes the oldest blocks until at most `limit` bytes are left.
    fn shrink(&mut self, limit: usize) -> Vec<Block> {
        let mut count = 0;
        while self.bytes > limit && count < self.blocks.len() {
            self.bytes -= self.blocks[count].capacity;
            count += 1;
        }
        self.blocks.drain(..count).collect()
    }
}

#[derive(Debug)]
struct Pool {
    process: u32,
    shelf: Mutex<Shelf>,
}

impl Pool {
    fn lock(&self) -> MutexGuard<'_, Shelf> {
        // A shelf is whole between its operations, and none of them panics.
        self.shelf.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The pool of this process.
fn pool() -> &'static Pool {
    let process = std::process::id();
    let current = POOL.load(Ordering::Acquire);
    // SAFETY: null or a pool leaked below, which is never freed.
    if let Some(pool) = unsafe { current.as_ref() }
        && pool.process == process
    {
        return pool;
    }
    let fresh = Box::into_raw(Box::new(Pool { process, shelf: Mutex::default() }));
    match POOL.compare_exchange(current, fresh, Ordering::AcqRel, Ordering::Acquire) {
        Ok(_) => {
            // SAFETY: published just now and never freed from here on.
            let pool: &'static Pool = unsafe { &*fresh };
            // SAFETY: as at the load above.
            if let Some(parent) = unsafe { current.as_ref() }
                && let Ok(mut inherited) = parent.shelf.try_lock()
            {
                // The child's copies of what the parent kept are as good as its own. A lock held at the fork stays so: then they are lost.
                let inherited = core::mem::take(&mut *inherited);
                drop(pool.lock().adopt(inherited));
            }
            pool
        }
        Err(winner) => {
            // SAFETY: `fresh` was made above and not published.
            drop(unsafe { Box::from_raw(fresh) });
            // SAFETY: another thread of this process published it (pools are only replaced by a child's), and it is never freed.
            unsafe { &*winner }
        }
    }
}

impl Shelf {
    fn adopt(&mut self, other: Self) -> Vec<Block> {
        self.bytes += other.bytes;
        self.blocks.splice(0..0, other.blocks);
        self.shrink(limit())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The pool is one per process, and so is the lock of the tests that look at it.
    fn alone() -> MutexGuard<'static, ()> {
        static ALONE: Mutex<()> = Mutex::new(());
        let guard = ALONE.lock().unwrap_or_else(PoisonError::into_inner);
        set_limit(DEFAULT_LIMIT);
        clear();
        guard
    }

    fn fill(buffer: &Buffer, byte: u8) {
        // SAFETY: the buffer owns that many bytes.
        unsafe { buffer.as_ptr().write_bytes(byte, buffer.capacity()) };
    }

    fn first_and_last(buffer: &Buffer) -> (u8, u8) {
        // SAFETY: both lie in the buffer, which `fill` has written.
        unsafe { (buffer.as_ptr().read(), buffer.as_ptr().add(buffer.capacity() - 1).read()) }
    }

    #[test]
    fn a_dead_buffer_serves_the_next_result_of_its_size() {
        let _alone = alone();
        let first = Buffer::new(5 << 20).unwrap();
        let address = first.as_ptr();
        fill(&first, 7);
        drop(first);
        assert_eq!(kept(), 5 << 20);
        let second = Buffer::new((5 << 20) - 100).unwrap();
        assert_eq!(second.as_ptr(), address);
        assert_eq!(first_and_last(&second), (7, 7), "recycled memory is not cleared");
        assert_eq!(kept(), 0);
    }

    #[test]
    fn living_buffers_never_share() {
        let _alone = alone();
        let mut living: Vec<Buffer> = Vec::new();
        // Sizes repeat, deaths come in an order of their own: every survivor must still hold what was written to it.
        for step in 0_usize..200 {
            let buffer = Buffer::new(RECYCLE_FROM + (step * 7 % 5) * GRANULE).unwrap();
            fill(&buffer, (step % 251) as u8);
            living.push(buffer);
            if step % 3 != 0 {
                living.remove(step * 13 % living.len());
            }
            let mut spans: Vec<_> = living.iter().map(|b| (b.as_ptr() as usize, b.capacity())).collect();
            spans.sort_unstable();
            assert!(spans.windows(2).all(|pair| pair[0].0 + pair[0].1 <= pair[1].0), "two living buffers overlap");
            assert!(living.iter().all(|b| first_and_last(b).0 == first_and_last(b).1));
        }
    }

    #[test]
    fn much_larger_buffers_are_not_wasted_on_small_results() {
        let _alone = alone();
        drop(Buffer::new(16 << 20).unwrap());
        let small = Buffer::new(4 << 20).unwrap();
        assert!(small.capacity() < 8 << 20);
        assert_eq!(kept(), 16 << 20);
    }

    #[test]
    fn the_limit_holds_and_the_oldest_goes_first() {
        let _alone = alone();
        set_limit(10 << 20);
        let buffers: Vec<_> = [2, 3, 4, 6].map(|mib| Buffer::new(mib << 20).unwrap()).into();
        drop(buffers);
        assert_eq!(kept(), (4 + 6) << 20);
        drop(Buffer::new(11 << 20).unwrap());
        assert_eq!(kept(), (4 + 6) << 20, "a buffer above the limit is freed and evicts nothing");
        set_limit(6 << 20);
        assert_eq!(kept(), 6 << 20);
        clear();
        assert_eq!(kept(), 0);
        set_limit(0);
        drop(Buffer::new(2 << 20).unwrap());
        assert_eq!(kept(), 0);
    }

    #[test]
    fn memory_is_aligned() {
        let _alone = alone();
        for bytes in [1, RECYCLE_FROM, HUGE_FROM - 1, HUGE_FROM + 1, 33 << 20] {
            let buffer = Buffer::new(bytes).unwrap();
            assert!(buffer.capacity() >= bytes);
            let alignment = if buffer.capacity() >= HUGE_FROM { HUGE_PAGE } else { 4096 };
            assert_eq!(buffer.as_ptr() as usize % alignment, 0);
            fill(&buffer, 1);
        }
    }

    #[test]
    fn impossible_sizes_are_refused() {
        let _alone = alone();
        assert!(Buffer::new(usize::MAX).is_none());
        assert!(Buffer::new(isize::MAX as usize).is_none());
        assert!(Buffer::new(1 << 60).is_none());
    }

    #[test]
    fn threads_take_and_return_at_once() {
        let _alone = alone();
        std::thread::scope(|scope| {
            for thread in 0_u8..4 {
                scope.spawn(move || {
                    for _ in 0..50 {
                        let buffer = Buffer::new(RECYCLE_FROM).unwrap();
                        fill(&buffer, thread);
                        std::thread::yield_now();
                        assert_eq!(first_and_last(&buffer), (thread, thread));
                    }
                });
            }
        });
        assert!(kept() <= 4 * RECYCLE_FROM);
    }

    #[cfg(unix)]
    #[test]
    fn a_child_of_a_locked_parent_does_not_hang() {
        let _alone = alone();
        drop(Buffer::new(RECYCLE_FROM).unwrap());
        let held = pool().lock();
        // SAFETY: the child only uses this module and the allocator, which glibc and musl keep usable after fork, and leaves by `_exit`.
        let child = unsafe { libc::fork() };
        if child == 0 {
            // A hang ends by the alarm, which the parent sees as death by a signal.
            // SAFETY: both calls are async-signal-safe.
            unsafe { libc::alarm(20) };
            let buffer = Buffer::new(RECYCLE_FROM);
            let mapped = buffer.is_some();
            drop(buffer);
            let works = mapped && kept() == RECYCLE_FROM;
            // SAFETY: as above.
            unsafe { libc::_exit(i32::from(!works)) };
        }
        assert!(child > 0, "fork failed");
        let mut status = 0;
        // SAFETY: the child is ours and `status` is writable.
        assert_eq!(unsafe { libc::waitpid(child, &raw mut status, 0) }, child);
        drop(held);
        assert!(libc::WIFEXITED(status) && libc::WEXITSTATUS(status) == 0, "status {status}");
    }
}
