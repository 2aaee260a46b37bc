//! Many classes of columns that are read, and their results written, where they stand: Fortran order, NCHW. No copies are made, and runs are as long
//! as memory wants them. The arithmetic is [`super::by_columns`]'s.

use std::sync::Mutex;

use crate::array::{Columns, DType};
use crate::kernels::columns::{BLOCK, Dense, Origin, balance, lift};
use crate::kernels::finish::{Terms, Tile, WIDTH};
use crate::kernels::sweep::{self, Carry, Running, STEP, Sweep};
use crate::simd::{Isa, Kernel};
use crate::threads;

use super::by_columns::Emit;
use super::job::{Job, Kind, OUT, X};
use super::plan::Path;
use super::scratch::{Buffers, Scratch, Work, room};
use super::strip::{Finish, Strip, Total, leave_out, left_out, prepare, settle, targets};

/// Columns that are worked on together: memory reads runs of a page at its own speed, and shorter ones at half of it.
pub(super) const RUN: usize = 1024;

/// Classes of a part, which has states of its own: threads can share columns.
const PART: usize = 8192;

/// How many classes further than those that are computed with memory is asked for: more than are read at a time, as the last of them is wanted as soon as
/// the first, and was asked for last.
const LATER: usize = STEP + 4;

/// Parts that the classes are cut into: a function of their number alone.
pub(super) fn parts(classes: usize) -> usize {
    if classes < 2 * PART { 1 } else { classes.div_ceil(PART) }
}

/// The first class of a part and their number.
pub(super) fn part(classes: usize, index: usize) -> (usize, usize) {
    if parts(classes) == 1 { (0, classes) } else { (index * PART, PART.min(classes - index * PART)) }
}

/// Rows per task: where threads can share columns, as many as are worked on together; otherwise fewer if there would be too few tasks.
pub(super) fn rows_per_task(rows: usize, classes: usize) -> usize {
    if parts(classes) > 1 { RUN } else { (rows / 8 / WIDTH * WIDTH).clamp(WIDTH, RUN) }
}

/// Whether it is this simple.
pub(super) fn fits(job: &Job) -> bool {
    !job.by_rows
        && job.classes.size > BLOCK
        && job.tile_read == Path::Columns
        && (job.out.is_none() || job.tile_write == Path::Columns)
        && matches!(job.x.dtype(), DType::F32 | DType::F64)
        && !job.bend.is_some()
        && !job.terms.dense
        && job.terms.entries <= 1
}

/// Classes into running states.
pub(super) struct Take<'s, T>(pub(super) Sweep<'s, T>);

impl<T: Work> Kernel for Take<'_, T> {
    type Output = ();
    #[inline(always)]
    fn run<S: Isa>(self, isa: S) {
        sweep::sweep(isa, self.0);
    }
}

/// Running states of all parts into a tile.
pub(super) struct Land<'s, T> {
    pub(super) scale: f64,
    pub(super) x: Columns<'s, T>,
    pub(super) parts: usize,
    pub(super) running: Running<'s, T>,
    pub(super) tile: &'s mut Tile,
}

impl<T: Work> Kernel for Land<'_, T> {
    type Output = ();
    #[inline(always)]
    fn run<S: Isa>(self, isa: S) {
        sweep::land(isa, self.scale, self.x, self.parts, &self.running, self.tile);
    }
}

/// One strip, by `threads` threads.
pub(super) fn strip<T: Work>(strip: &Strip, threads: usize, scratch: &mut Scratch, total: &mut Total) {
    let Strip { job, kept, .. } = *strip;
    let (classes, n, scale) = (job.classes.size, kept.len(), job.terms.scale);
    let (tile, Buffers { running, sums, .. }, _) = T::buffers(scratch);
    let plain = prepare(strip, tile, &[]);
    let x = || job.x.columns::<T>(job.rows.offset(X, kept[0]), job.classes.inner_stride(X), classes, n);
    let origin = |class: usize, step: isize| {
        let stride = job.classes.inner_stride(X);
        let base = job.x.address(job.rows.offset(X, kept[0])).wrapping_offset(class as isize * stride);
        Some(Origin { base, class: step * stride, column: size_of::<T>() as isize, also: 0 })
    };
    let parts = parts(classes);
    let [pitch, wide] = sweep::room(n);
    let (running, sums) = (room(running, parts * pitch), room(sums, parts * wide));
    let each: Vec<_> = running.chunks_mut(pitch).zip(sums.chunks_mut(wide)).map(Mutex::new).collect();
    threads::for_each(threads, parts, &|index| {
        let (first, count) = part(classes, index);
        if let Ok(mut states) = each[index].lock() {
            let (lanes, sums) = &mut *states;
            let running = Running { lanes, sums };
            job.level.run(Take(Sweep { scale, x: x().part(first, count), first: true, next: origin(first + LATER, 1), running }));
        }
    });
    drop(each);
    job.level.run(Land { scale, x: x(), parts, running: Running { lanes: running, sums }, tile });
    targets(strip, |slot, _, class| tile.x_target[slot] = x().get(class, slot).to_f64());
    let terms = Terms { plain, ..job.terms };
    job.level.run(Finish { terms: &terms, tile, rows: (0, n), single: T::DTYPE == DType::F32 });
    let left_out = left_out(strip);
    if left_out {
        leave_out(strip, tile);
    }
    if let Some(out) = job.out {
        let high = balance::<T>(None, n, false, tile);
        let (log, most) = (job.kind == Kind::LogSoftmax, if job.kind == Kind::Softmax { 1.0 } else { f64::INFINITY });
        let stream = strip.streams() && !left_out;
        let (shared, each) = (&*tile, running.chunks_mut(pitch).map(Mutex::new).collect::<Vec<_>>());
        let results = || out.columns::<T>(job.rows.offset(OUT, kept[0]), job.classes.inner_stride(OUT), classes, n);
        threads::for_each(threads, parts, &|index| {
            // Backwards: what was read last is still in the caches.
            let (first, count) = part(classes, parts - 1 - index);
            if let Ok(mut formulas) = each[index].lock() {
                let next = origin((first + count).wrapping_sub(2), -1);
                let (x, out) = (x().part(first, count).reversed(), results().part(first, count).reversed());
                let carry = Carry { scale, x, out, stream, next, formulas: &mut formulas };
                job.level.run(Emit { carry, dense: Dense::None, tile: shared, log, stored: false, most });
                job.hand_on();
            }
        });
        let out = results();
        if high {
            lift(out, tile);
        }
        if job.kind == Kind::Loss {
            targets(strip, |slot, _, class| out.set(class, slot, T::from_f64(tile.patch[slot])));
        }
        if left_out {
            for c in 0..classes {
                (0..n).filter(|&slot| !job.kept(kept[slot])).for_each(|slot| out.set(c, slot, T::ZERO));
            }
        }
    }
    settle(strip, tile, total);
}
