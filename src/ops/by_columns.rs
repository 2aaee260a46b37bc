//! Tasks whose vectors run across rows: few classes, and class axes that are strided. See [`crate::kernels::columns`].
//!
//! Whatever depends on the layout happens while a tile is filled and emptied; the arithmetic of a row is the same for all of them.

use crate::array::{Array, Columns, ColumnsMut, DType, Offsets, Out, Span};
use crate::kernels::columns::{self, BLOCK, Blocks, Dense, Origin, Reduce, Runs};
use crate::kernels::finish::{APART, Terms, Tile, WIDTH};
use crate::kernels::sweep::{self, Carry, Running, Sweep};
use crate::simd::{Isa, Kernel};

use super::bent::Bent;
use super::few;
use super::job::{Job, Kind, OUT, PROBS, X};
use super::plan::Path;
use super::scratch::{Buffer, Buffers, Scratch, Work, room};
use super::source::unbend_patches;
use super::straight::{self, Land, Take};
use super::stream::{Spread, dense_column, is_probs, shared_stream, spreads};
use super::strip::{Count, Finish, Strip, Total, collect, ignored, leave_out, left_out, prepare, settle, targets, weighed};
use super::tiles::LANES;

/// Bytes of a tile: it stays in L1 beside the coefficients of its rows.
const ROOM: usize = 16 << 10;

/// The reduction of a strip.
struct Read<'s, T>(Reduce<'s, T>, &'s mut Tile);

impl<T: Work> Kernel for Read<'_, T> {
    type Output = ();
    #[inline(always)]
    fn run<S: Isa>(self, isa: S) {
        columns::reduce(isa, self.0, self.1);
    }
}

/// From exponentials or logits to results.
pub(super) struct Emit<'s, T> {
    pub(super) carry: Carry<'s, T>,
    pub(super) dense: Dense<'s, T>,
    pub(super) tile: &'s Tile,
    pub(super) log: bool,
    pub(super) stored: bool,
    /// No product of a and an exponential is larger.
    pub(super) most: f64,
}

impl<T: Work> Kernel for Emit<'_, T> {
    type Output = ();
    #[inline(always)]
    fn run<S: Isa>(self, isa: S) {
        let out = self.carry.out;
        if self.log {
            sweep::emit_log(isa, self.carry, self.tile);
        } else if self.stored {
            columns::emit_stored(isa, out, out.read().width(), self.dense, self.tile, self.most);
        } else {
            sweep::emit_exp(isa, self.carry, self.dense, self.tile, self.most);
        }
    }
}

/// How a strip lies: bytes of a run, and from run to run, and their number.
type Lie = (usize, (isize, usize));

/// Rows are one stretch of memory: the processor reads it ahead by itself, but from memory not far enough.
fn lie(strip: &Strip, operand: usize, path: Path) -> Option<Lie> {
    let Strip { job, kept, .. } = *strip;
    let (classes, size) = (job.classes.size, job.x.dtype().size());
    match strip.path(path) {
        Path::Columns => Some((kept.len() * size, (job.classes.inner_stride(operand), classes))),
        Path::Rows if job.far && strip.adjacent(operand, classes, size) => Some((kept.len() * classes * size, (0, 1))),
        _ => None,
    }
}

/// Where the results of a strip go, if they lie like its logits, but elsewhere.
fn results(strip: &Strip) -> Option<*const u8> {
    let job = strip.job;
    let alike = |out: &&Array| {
        out.dtype() == job.x.dtype() && lie(strip, OUT, job.tile_write) == lie(strip, X, job.tile_read) && !out.starts_as(job.x)
    };
    Some(job.out.map(Out::array).filter(alike)?.address(job.rows.offset(OUT, strip.kept[0])))
}

/// The next strip, and where the results of this one go.
pub(super) fn ahead(strip: &Strip) -> Runs {
    let Strip { job, kept, .. } = *strip;
    let Some((bytes, classes)) = lie(strip, X, job.tile_read) else { return Runs::NONE };
    let next = Runs::new(job.x.address(job.rows.offset(X, kept[0])).wrapping_add(bytes), bytes, classes);
    results(strip).map_or(next, |to| next.and(to))
}

/// The operands of a strip, block by block.
struct Operands<'s, 'j, 'a, T> {
    strip: &'s Strip<'j, 'a>,
    stride: usize,
    offsets: &'s mut [Offsets; 3],
    flat: &'s mut Buffer<T>,
    bent: &'s mut Bent<T>,
    /// What smoothing gives each class of a row, where every row has a dense stream of its own, and the first row that is being filled.
    spreads: Vec<Spread>,
    from: usize,
    /// The logits of the sparse targets, as in the tile, once their blocks were filled.
    x_target: Vec<f64>,
    /// Those targets, where there are several blocks.
    by_class: ByClass,
}

impl<T: Work> Operands<'_, '_, '_, T> {
    /// The logits, bent; to be undone if there is a `gradient`.
    fn x(&mut self, strip: &Strip, x: &mut [T], classes: (usize, usize), gradient: bool) {
        let job = strip.job;
        strip.fill::<T>(job.x, X, job.tile_read, classes, (&mut *x, self.stride), self.offsets, self.flat);
        self.bent.bend(strip, x, self.stride, classes, gradient);
    }

    /// The dense stream that each row has of its own.
    fn dense(&mut self, strip: &Strip, dense: &mut [T], classes: (usize, usize)) {
        let (job, stride, (first, count)) = (strip.job, self.stride, classes);
        if let Some(probs) = job.probs {
            let path = if probs.dtype() == T::DTYPE { job.tile_probs } else { Path::Gathered };
            strip.fill::<T>(probs, PROBS, path, classes, (&mut *dense, stride), self.offsets, self.flat);
        } else {
            dense[..count * stride].fill(T::ZERO);
        }
        if is_probs(job) {
            return;
        }
        let n = strip.kept.len();
        if self.spreads.is_empty() {
            self.spreads.resize(self.strip.kept.len(), Spread::default());
        }
        let spreads = &self.spreads[self.from..];
        for (c, line) in dense.chunks_mut(stride).enumerate().take(count) {
            dense_column(job, first + c, spreads, self.bent.mask.line(strip, c, stride), &mut line[..n]);
        }
    }
}

impl<T: Work> Blocks<T> for Operands<'_, '_, '_, T> {
    fn fill(&mut self, x: &mut [T], dense: &mut [T], first: usize, count: usize, from: usize, width: usize) {
        let kept = self.strip.kept;
        let strip = Strip::new(self.strip.job, &kept[from..kept.len().min(from + width)]);
        self.from = from;
        self.x(&strip, x, (first, count), false);
        for &(class, at) in self.by_class.part(first, count) {
            let slot = at % APART;
            if (from..from + width).contains(&slot) {
                self.x_target[at] = x[(class - first) * self.stride + slot - from].to_f64();
            }
        }
        if strip.job.own_dense() {
            self.dense(&strip, dense, (first, count));
        }
    }
}

/// The sparse targets of a strip in the order of their classes, each with its place in a tile: a block finds its own among them.
struct ByClass(Vec<(usize, usize)>);

impl ByClass {
    fn new(strip: &Strip) -> Self {
        let mut all = Vec::with_capacity(strip.kept.len());
        targets(strip, |slot, j, class| all.push((class, j * APART + slot)));
        all.sort_unstable();
        Self(all)
    }

    /// Those of `count` classes from `first` on.
    fn part(&self, first: usize, count: usize) -> &[(usize, usize)] {
        let at = |class: usize| self.0.partition_point(|&(c, ..)| c < class);
        &self.0[at(first)..at(first + count)]
    }
}

/// Rows `first..last`, in strips, each by `threads` threads where they can share it; their losses are added to `total`.
pub(super) fn run<T: Work>(job: &Job, first: usize, last: usize, threads: usize, scratch: &mut Scratch, total: &mut Total) {
    let (mut long, mut kept) = (Vec::new(), [0; WIDTH]);
    // Whole vectors of any level.
    let width = (ROOM / (size_of::<T>() * job.classes.size.clamp(1, BLOCK)) / LANES * LANES).clamp(LANES, WIDTH);
    let straight = straight::fits(job);
    let width = if straight {
        straight::RUN
    } else if job.classes.size > BLOCK {
        WIDTH
    } else {
        width
    };
    if straight {
        long.resize(width, 0);
    }
    let kept = if straight { &mut long[..] } else { &mut kept };
    let plain = few::all_plain::<T>(job);
    let mut row = first;
    while row < last {
        let (start, n);
        if job.tile_read == Path::Columns {
            // Vectors of adjacent rows carry ignored ones along.
            let inner = job.rows.inner_len();
            let run = width.min(last - row).min(inner - row % inner);
            job.level.run(Count(row, &mut kept[..run]));
            (start, row) = (row, row + run);
            n = if job.weights.all || (start..row).any(|row| job.kept(row)) { run } else { 0 };
        } else {
            (start, (n, row)) = (row, collect(job, row, last, &mut kept[..width]));
        }
        if n > 0 {
            let rows = Strip::new(job, &kept[..n]);
            if straight {
                straight::strip::<T>(&rows, threads, scratch, total);
            } else if plain {
                few::plain_strip::<T>(&rows, width, scratch, total);
            } else {
                strip::<T>(&rows, width, scratch, total);
            }
        }
        if row - start > n {
            ignored(job, start, row, &kept[..n]);
        }
    }
}

/// One strip: fills, reduces, finishes, emits.
pub(super) fn strip<T: Work>(strip: &Strip, width: usize, scratch: &mut Scratch, total: &mut Total) {
    let Strip { job, kept, .. } = *strip;
    let (classes, n) = (job.classes.size, kept.len());
    let few = classes <= BLOCK;
    let mut offsets = core::mem::take(&mut scratch.offsets);
    let (tile, buffers, _) = T::buffers(scratch);
    let Buffers { x, dense, shared, block: flat, bent, running, sums, .. } = buffers;
    shared_stream(job, shared);
    let own = job.own_dense();
    let shared = &shared[..];
    let depth = classes.clamp(1, BLOCK);
    let stride = width;
    let x = room(x, depth * stride);
    let dense = room(dense, if own { depth * stride } else { 0 });
    let offsets = &mut offsets;
    let mut operands = Operands::<T> {
        strip,
        stride,
        offsets,
        flat,
        bent,
        spreads: Vec::new(),
        from: 0,
        x_target: Vec::new(),
        by_class: if few { ByClass(Vec::new()) } else { ByClass::new(strip) },
    };
    if few {
        operands.x(strip, x, (0, classes), job.out.is_some());
    }
    operands.spreads = if few { operands.bent.mask.spreads(strip, stride) } else { spreads(strip) };
    if few && own {
        operands.dense(strip, dense, (0, classes));
    }
    let plain = prepare(strip, tile, &operands.spreads);
    if !few {
        operands.x_target = core::mem::take(&mut tile.x_target);
    }
    // The same losses as in the plain case.
    let mut losses = [f64::NAN; WIDTH];
    if few && few::plain::<T>(job) {
        let tiled = ColumnsMut::of(x, stride, classes, stride);
        few::losses(strip, tiled, operands.flat, &mut losses);
    }
    // Where the only target of each row stands in the tile. What is left out gets the target 0, and results that are overwritten.
    let mut index = [0; WIDTH];
    let indexed = few && job.kind == Kind::Loss && job.terms.entries == 1 && classes > 0;
    if let Some(labels) = &job.labels
        && indexed
    {
        for (slot, (at, &row)) in index.iter_mut().zip(kept).enumerate() {
            *at = labels.class[row].max(0) as usize * stride + slot;
            tile.x_target[slot] = x[*at].to_f64();
        }
    } else if few {
        targets(strip, |slot, j, class| {
            tile.x_target[j * APART + slot] = x[class * stride + slot].to_f64();
        });
    }
    let index = if indexed { &index[..n] } else { &[][..] };
    // With few classes the exponentials stay in the tile; with many they are computed again, block by block.
    let stored = few && job.out.is_some() && job.kind != Kind::LogSoftmax;
    let terms = Terms { stored, plain, ..job.terms };
    let (scale, linear) = (terms.scale, (job.kind == Kind::Loss && terms.dense, own));
    let from = Origin {
        base: job.x.address(job.rows.offset(X, kept[0])),
        class: job.classes.inner_stride(X),
        column: job.x.dtype().size() as isize,
        also: 0,
    };
    let origin = (!few && strip.path(job.tile_read) == Path::Columns).then_some(from);
    let ahead = if few { ahead(strip) } else { Runs::NONE };
    let later =
        |classes: usize| origin.map(|origin| Origin { base: origin.base.wrapping_offset(classes as isize * origin.class), ..origin });
    let blocks = &mut operands;
    if few || linear.0 {
        job.level
            .run(Read(Reduce { scale, classes, width: n, stride, x, dense, shared, linear, store: stored, blocks, origin, ahead }, tile));
    } else {
        let (parts, [lanes, wide]) = (straight::parts(classes), sweep::room(stride));
        let (running, sums) = (room(running, parts * lanes), room(sums, parts * wide));
        for index in 0..parts {
            let (start, count) = straight::part(classes, index);
            for first in (start..start + count).step_by(BLOCK) {
                let count = BLOCK.min(start + count - first);
                blocks.fill(x, dense, first, count, 0, n);
                let running = Running { lanes: &mut running[index * lanes..], sums: &mut sums[index * wide..] };
                let x = Columns::of(x, stride, count, stride);
                job.level.run(Take(Sweep { scale, x, first: first == start, next: later(first + count), running }));
            }
        }
        let x = Columns::of(x, stride, BLOCK, stride);
        job.level.run(Land { scale, x, parts, running: Running { lanes: running, sums }, tile });
    }
    if !few {
        tile.x_target = core::mem::take(&mut operands.x_target);
    }
    if stored && indexed {
        tile.e_target.iter_mut().zip(index).for_each(|(e, &at)| *e = x[at].to_f64());
    } else if stored {
        targets(strip, |slot, j, class| tile.e_target[j * APART + slot] = x[class * stride + slot].to_f64());
    }
    job.level.run(Finish { terms: &terms, tile, rows: (0, n), single: T::DTYPE == DType::F32 });
    for (slot, &loss) in losses.iter().enumerate().take(n).filter(|(_, loss)| !loss.is_nan()) {
        let class = job.labels.as_ref().map_or(0, |labels| labels.class[kept[slot]].max(0) as usize);
        let weight = job.weights.sample_weight(kept[slot]) * job.weight.get(class).copied().unwrap_or(1.0);
        tile.loss[slot] = weighed(loss, weight);
    }
    let left_out = left_out(strip);
    if left_out || classes == 0 && job.kind == Kind::Loss {
        leave_out(strip, tile);
    }
    if let Some(out) = job.out {
        unbend_patches(job, kept, tile);
        let high = columns::balance(stored.then(|| ColumnsMut::of(x, stride, depth, stride)), n, linear.0, tile);
        let formulas = room(running, sweep::room(stride)[0]);
        let log = job.kind == Kind::LogSoftmax;
        let most = if job.kind == Kind::Softmax { 1.0 } else { f64::INFINITY };
        let depth = if few || !linear.0 { depth } else { columns::block_of(classes) };
        operands.from = 0;
        // Where the results of a block go, to be asked for beside the logits of the next one. Halves are written past the caches no faster.
        let stream = !few && strip.streams() && job.x.dtype() == T::DTYPE;
        let to = results(strip).filter(|_| !stream && strip.path(job.tile_read) == Path::Columns);
        for first in (0..classes).step_by(depth) {
            let count = depth.min(classes - first);
            if !few {
                operands.x(strip, x, (first, count), true);
                if own {
                    operands.dense(strip, dense, (first, count));
                }
            }
            let dense = match linear {
                (false, _) => Dense::None,
                (true, false) => Dense::Shared(Span::of(&shared[first..first + count])),
                (true, true) => Dense::Tile(Columns::of(dense, stride, count, stride)),
            };
            let tiled = ColumnsMut::of(x, stride, count, stride);
            let next = later(first + count).map(|next| {
                let block = |to: *const u8| to.wrapping_offset(first as isize * next.class) as isize;
                Origin { also: to.map_or(0, |to| block(to).wrapping_sub(next.base as isize)), ..next }
            });
            let carry = Carry { scale, x: tiled.read(), out: tiled, stream: false, next, formulas };
            job.level.run(Emit { carry, dense, tile, log, stored, most });
            if high {
                columns::lift(tiled, tile);
            }
            operands.bent.unbend(strip, &mut x[..count * stride]);
            if job.kind == Kind::Loss {
                patch(strip, tile, &mut x[..], stride, (index, &operands.by_class), (first, count));
            }
            if left_out {
                for slot in (0..n).filter(|&slot| !job.kept(kept[slot])) {
                    (0..count).for_each(|c| x[c * stride + slot] = T::ZERO);
                }
            }
            strip.empty::<T>(out, (first, count), (x, stride), stream, operands.offsets, operands.flat);
        }
    }
    settle(strip, tile, total);
    scratch.offsets = core::mem::take(offsets);
}

/// The exact values at a lone maximum and at the sparse targets: those at `index`, or found by class if there are several blocks.
fn patch<T: Work>(
    strip: &Strip,
    tile: &Tile,
    x: &mut [T],
    stride: usize,
    (index, by_class): (&[usize], &ByClass),
    (first, count): (usize, usize),
) {
    if strip.job.terms.dense {
        for slot in (0..strip.kept.len()).filter(|&slot| tile.ties[slot] == 1.0) {
            let class = (tile.arg[slot] as usize).wrapping_sub(first);
            if class < count {
                x[class * stride + slot] = T::from_f64(tile.top[slot]);
            }
        }
    }
    if !index.is_empty() {
        return index.iter().zip(&tile.patch).for_each(|(&at, &value)| x[at] = T::from_f64(value));
    }
    let mut set = |class: usize, at: usize| x[(class - first) * stride + at % APART] = T::from_f64(tile.patch[at]);
    if count == strip.job.classes.size {
        targets(strip, |slot, j, class| set(class, j * APART + slot));
    } else {
        by_class.part(first, count).iter().for_each(|&(class, at)| set(class, at));
    }
}
