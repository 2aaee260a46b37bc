//! Huge rows: reduced a segment at a time, each as if it were a row, so that threads can share one, and with the same bits if they do not.

use std::sync::Mutex;

use crate::array::{DType, Rows, Span, SpanMut};
use crate::kernels::emit::From;
use crate::kernels::finish::Terms;
use crate::kernels::input::{Input, Known};
use crate::kernels::rows::{BLOCK, Reduce, Wanted};
use crate::kernels::state::{Reference, State};
use crate::threads;

use super::by_rows::{Way, put};
use super::job::{Job, Kind, OUT, Stores, X};
use super::results::{Results, To, patch};
use super::scratch::{Scratch, Work};
use super::strip::{Finish, Strip, Total, ignored, prepare, settle};

/// Classes of a segment.
const SEGMENT: usize = 64 * BLOCK;

/// Whether rows are reduced a segment at a time.
pub(super) fn segmented<T: Work>(job: &Job) -> bool {
    job.by_rows
        && job.direct
        && job.x.dtype() == T::DTYPE
        && !job.terms.dense
        && job.terms.entries <= 1
        && job.out.is_none_or(|_| job.direct_out)
        && job.classes.size >= 2 * SEGMENT
}

/// Segment `index` of a row, `x`: its state, and the logit of the target if that is in it. `after` is read after it, `known` is of the segment before.
fn segment<T: Work>(
    job: &Job,
    (row, index): (usize, usize),
    x: Span<T>,
    after: Span<T>,
    dst: Option<SpanMut<T>>,
    references: &mut [Reference],
    known: &mut Known<T>,
) -> (State, Option<f64>) {
    let class = job.labels.as_ref().filter(|labels| labels.entries == 1).map_or(usize::MAX, |labels| labels.class[row] as usize);
    let (class, mut logit) = ([(class.wrapping_sub(index * SEGMENT), 0)], [0.0]);
    let reduce = Reduce {
        scale: job.terms.scale,
        classes: x.len(),
        x: Input::Row { row: x, after },
        t: Input::None,
        dst,
        cold: job.cold,
        references,
        known,
        wanted: Wanted { classes: &class, logits: &mut logit },
    };
    let state = job.level.run(reduce);
    (state, (class[0].0 < x.len()).then_some(logit[0]))
}

/// Where segment `index` of a row begins, and its classes.
fn part(classes: usize, index: usize) -> (usize, usize) {
    let start = index * SEGMENT;
    (start, SEGMENT.min(classes - start))
}

/// A row by one thread: its state, and the logit of the target. `after` is the next row.
pub(super) fn reduce<T: Work>(
    job: &Job,
    row: usize,
    x: Span<T>,
    after: Span<T>,
    dst: Option<SpanMut<T>>,
    references: &mut [Reference],
    known: &mut Known<T>,
) -> (State, Option<f64>) {
    let count = x.len().div_ceil(SEGMENT);
    let mut one = |index: usize| {
        let (start, n) = part(x.len(), index);
        let after = if index + 1 < count { x.part(start + n, part(x.len(), index + 1).1) } else { after };
        let references = &mut references[index * SEGMENT / BLOCK..];
        segment(job, (row, index), x.part(start, n), after, dst.map(|dst| dst.part(start, n)), references, known)
    };
    let mut all = one(0);
    for index in 1..count {
        let (state, logit) = one(index);
        all = (all.0.join(state, job.terms.scale), all.1.or(logit));
    }
    all
}

/// Rows by several threads each. Their losses are added to `total`.
pub(super) fn split<T: Work>(job: &Job, threads: usize, scratch: &mut Scratch, total: &mut Total) {
    let classes = job.classes.size;
    let Way { store, at_once, .. } = Way::of::<T>(job);
    let store = store && job.stores != Stores::PastAnew;
    let from = match job.kind {
        Kind::LogSoftmax => From::Logs,
        _ if store => From::Stored,
        _ => From::Anew,
    };
    let tile = T::buffers(scratch).0;
    for row in 0..job.rows.size {
        let kept = &[row][..usize::from(job.kept(row))];
        if kept.is_empty() {
            ignored(job, row, row + 1, kept);
            continue;
        }
        let strip = Strip::new(job, kept);
        let plain = prepare(&strip, tile, &[]);
        let x = || job.x.span::<T>(job.rows.offset(X, row), classes);
        let out = || job.out.map(|out| out.span::<T>(job.rows.offset(OUT, row), classes));
        let none = [Reference { k: 0.0, b: 0.0 }; SEGMENT / BLOCK];
        let parts: Vec<_> = (0..classes.div_ceil(SEGMENT)).map(|_| Mutex::new((None, none))).collect();
        threads::for_each(threads, parts.len(), &|index| {
            let (start, n) = part(classes, index);
            let dst = out().filter(|_| store).map(|out| out.part(start, n));
            if let Ok(mut of_part) = parts[index].lock() {
                let (result, references) = &mut *of_part;
                // Nothing is read after it: in place, another thread may be writing there.
                let after = Span::of(&[]);
                *result = Some(segment(job, (row, index), x().part(start, n), after, dst, references, &mut Known::default()));
            }
        });
        let parts: Vec<_> = parts.into_iter().filter_map(|part| part.into_inner().ok()).collect();
        let joined = parts.iter().filter_map(|part| part.0).reduce(|all, next| (all.0.join(next.0, job.terms.scale), all.1.or(next.1)));
        let (state, logit) = joined.unwrap_or_else(|| unreachable!("there are segments, and a panic in one is the caller's"));
        put(tile, 0, &state);
        if let Some(logit) = logit {
            tile.x_target[0] = logit;
        }
        let terms = Terms { plain, ..job.terms };
        job.level.run(Finish { terms: &terms, tile, rows: (0, 1), single: T::DTYPE == DType::F32 });
        if let Some(results) = job.out {
            let shared = &*tile;
            threads::for_each(threads, parts.len(), &|index| {
                let (start, n) = part(classes, index);
                let src = if store { out().map_or(x(), SpanMut::read) } else { x() };
                let references = if store { &parts[index].1[..n.div_ceil(BLOCK)] } else { &[] };
                let offset = job.rows.offset(OUT, row) + (start * size_of::<T>()) as isize;
                let emit = Results { job, from, tile: shared, first: 0, past: at_once && !store };
                emit.write(Rows::single(src.part(start, n)), Span::of(&[]), references, To::Run(results, offset, n));
                job.hand_on();
            });
            patch(&strip, tile, results, at_once);
        }
        settle(&strip, tile, total);
    }
}
