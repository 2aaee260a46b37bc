//! Tiles filled and emptied: columns and rows copied, transposed, widened and narrowed.

use crate::array::{Columns, ColumnsMut, Element, Float, Rows, RowsMut, Span, SpanMut, Vf};
use crate::simd::{Isa, Vector};

/// Adjacent rows, widened; lanes beyond the last one are zero. What lies `ahead` bytes behind is asked for.
#[inline(always)]
pub fn copy_in<S: Isa, E: Element<Acc = T>, T: Float>(isa: S, src: Columns<E>, tile: ColumnsMut<T>, ahead: Option<isize>) {
    for c in 0..src.classes() {
        if let Some(ahead) = ahead {
            src.prefetch(isa, c, ahead);
        }
        for j in (0..src.width()).step_by(Vf::<S, T>::LANES) {
            tile.store_whole(isa, c, j, src.load(isa, c, j));
        }
    }
}

/// The inverse of [`copy_in`]; `stream` writes past the caches, if vectors lie on lines there. (Lines in parts would keep all others waiting: they are asked for.)
#[inline(always)]
pub fn copy_out<S: Isa, E: Element<Acc = T>, T: Float>(isa: S, tile: Columns<T>, dst: ColumnsMut<E>, stream: bool) {
    let (step, classes, width) = (Vf::<S, T>::LANES, dst.read().classes(), dst.read().width());
    let lead = if stream && E::DTYPE == T::DTYPE { dst.read().lead::<S>().min(width) } else { 0 };
    if lead > 0 {
        for c in 0..classes {
            dst.read().prefetch(isa, c, 2 * dst.read().stride());
            dst.put(isa, c, (0, lead), false, tile.load_whole(isa, c, 0));
            for j in (lead..width).step_by(step) {
                dst.store(isa, c, j, false, tile.load(isa, c, j));
            }
        }
        return;
    }
    for c in 0..classes {
        for j in (0..width).step_by(step) {
            dst.store(isa, c, j, stream, tile.load_whole(isa, c, j));
        }
    }
}

/// Rows of adjacent classes, four classes at a time; the last four overlap with those before them. `src` has whole vectors of rows.
#[inline(always)]
pub fn transpose_in<S: Isa, T: Float>(isa: S, src: Rows<T>, tile: ColumnsMut<T>) {
    let classes = src.len();
    if classes < 4 {
        for c in 0..classes {
            for r in 0..src.count() {
                tile.set(c, r, src.get(r, c));
            }
        }
        return;
    }
    let mut following = src.following(Vf::<S, T>::LANES);
    for r in (0..src.count()).step_by(Vf::<S, T>::LANES) {
        following.ask(isa);
        let mut c = 0;
        loop {
            let (v, four) = (src.load4(isa, r, c), tile.part(c, 4));
            four.store_whole(isa, 0, r, v[0]);
            four.store_whole(isa, 1, r, v[1]);
            four.store_whole(isa, 2, r, v[2]);
            four.store_whole(isa, 3, r, v[3]);
            if c + 4 == classes {
                break;
            }
            c = (c + 4).min(classes - 4);
        }
    }
}

/// The inverse of [`transpose_in`]; `dst` may have any number of rows.
#[inline(always)]
pub fn transpose_out<S: Isa, T: Float>(isa: S, tile: Columns<T>, dst: RowsMut<T>) {
    let (classes, rows) = (dst.read().len(), dst.read().count());
    let mut r = 0;
    let mut following = dst.read().following(Vf::<S, T>::LANES);
    while classes >= 4 && r + Vf::<S, T>::LANES <= rows {
        following.ask(isa);
        let mut c = 0;
        loop {
            let four = tile.part(c, 4);
            let v = [four.load_whole(isa, 0, r), four.load_whole(isa, 1, r), four.load_whole(isa, 2, r), four.load_whole(isa, 3, r)];
            dst.store4(isa, r, c, v);
            if c + 4 == classes {
                break;
            }
            c = (c + 4).min(classes - 4);
        }
        r += Vf::<S, T>::LANES;
    }
    for r in r..rows {
        for c in 0..classes {
            dst.set(r, c, tile.get(c, r));
        }
    }
}

/// Adjacent rows of two adjacent classes.
#[inline(always)]
pub fn deinterleave_in<S: Isa, E: Element<Acc = T>, T: Float>(isa: S, src: Span<E>, tile: ColumnsMut<T>) {
    let step = Vf::<S, T>::LANES;
    let zero = E::from_acc(T::ZERO);
    let mut i = 0;
    while i < src.len() {
        let left = src.len() - i;
        let (a, b) = if left >= 2 * step {
            (src.load(isa, i), src.load(isa, i + step))
        } else if left > step {
            (src.load(isa, i), src.load_partial(isa, i + step, left - step, zero))
        } else {
            (src.load_partial(isa, i, left, zero), Vf::<S, T>::splat(isa, T::ZERO))
        };
        let (even, odd) = a.deinterleave(b);
        tile.store_whole(isa, 0, i / 2, even);
        tile.store_whole(isa, 1, i / 2, odd);
        i += 2 * step;
    }
}

/// The inverse of [`deinterleave_in`].
#[inline(always)]
pub fn interleave_out<S: Isa, E: Element<Acc = T>, T: Float>(isa: S, tile: Columns<T>, dst: SpanMut<E>) {
    let step = Vf::<S, T>::LANES;
    let len = dst.read().len();
    let mut i = 0;
    while i < len {
        let (a, b) = tile.load_whole(isa, 0, i / 2).interleave(tile.load_whole(isa, 1, i / 2));
        let left = len - i;
        if left >= 2 * step {
            dst.store(isa, i, a);
            dst.store(isa, i + step, b);
        } else {
            dst.store_partial(isa, i, left.min(step), a);
            dst.store_partial(isa, i + left.min(step), left.saturating_sub(step), b);
        }
        i += 2 * step;
    }
}

/// A run of elements as another type that is computed in the same: widened, or rounded once.
#[inline(always)]
pub fn convert<S: Isa, A: Element<Acc = T>, B: Element<Acc = T>, T: Float>(isa: S, src: Span<A>, dst: SpanMut<B>) {
    let step = Vf::<S, T>::LANES;
    let mut i = 0;
    while i + step <= src.len() {
        dst.store(isa, i, src.load(isa, i));
        i += step;
    }
    for i in i..src.len() {
        dst.set(i, B::from_acc(src.get(i).to_acc()));
    }
}
