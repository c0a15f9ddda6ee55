// A call of products with a few rows of activations. native/library.py compiles this file.

#include "products.h"

namespace {

struct Call {
  X x;
  std::vector<Weight> weights;
  int64_t units = 0;  // for each block of rows

  void multiply(int64_t unit) const {
    thread_local Worker worker;
    int64_t begin = unit / units * kBlockRows, place = unit % units;
    size_t which = weights.size() - 1;
    while (weights[which].first_unit > place) --which;
    const Weight& w = weights[which];
    int64_t n = (place - w.first_unit) * w.unit_channels();
    worker.multiply(x, begin, std::min(begin + kBlockRows, x.m), w, n);
  }
};

// Arguments: x [m, k]; then of each weight the index of its layer and its arrays, with an axis for
// layers if it has several. `about` describes weights by kNumbers each. Results: float32 [m, n] each.
ffi::Error multiply_all(ffi::ThreadPool pool, ffi::Span<const int64_t> about,
                        ffi::RemainingArgs args, ffi::RemainingRets results) {
  auto x_buffer = *args.get<ffi::AnyBuffer>(0);
  auto call = std::make_shared<Call>();
  X& x = call->x;
  x.m = x_buffer.dimensions()[0], x.k = x_buffer.dimensions()[1];
  x.allocate(static_cast<const uint8_t*>(x_buffer.untyped_data()), x_buffer.element_type());
  float levels = INFINITY;
  int64_t work = 0;
  for (size_t i = 0, next = 1; i < results.size(); ++i) {
    const int64_t* a = about.begin() + i * kNumbers;
    int64_t layers = a[3];
    auto layer = *args.get<ffi::AnyBuffer>(next++);
    int64_t index = std::clamp<int64_t>(*layer.typed_data<int32_t>(), 0, layers - 1);
    auto take = [&]() -> Numbers {
      auto array = *args.get<ffi::AnyBuffer>(next++);
      int64_t bytes = static_cast<int64_t>(array.size_bytes()) / layers;
      work += bytes;
      return {static_cast<const uint8_t*>(array.untyped_data()) + bytes * index,
              array.element_type()};
    };
    Weight w = {};
    w.kind = static_cast<Kind>(a[0]), w.n = a[1], w.k = a[2];
    w.group = a[4], w.offset = a[5], w.has = a[6], w.float8 = a[7];
    w.bits[0] = a[8] % 16, w.bits[1] = a[8] / 16;
    if (w.kind == kGrouped) {
      for (int p = 0; p < 2 && w.bits[p] > 0; ++p) w.planes[p] = take();
      w.scales = take();
      if (a[9]) w.parents = take();
      if (w.has != kNone) w.minima = take();
      if (a[9] && w.has == kMinimum) w.minima_parents = take();
    } else {
      w.values = take();
    }
    if (w.kind == kInt8) {
      w.scales = take();
      levels = std::min(levels, *reinterpret_cast<const float*>(take().data));
    }
    w.out = (*results.get<ffi::AnyBuffer>(i))->typed_data<float>();
    w.first_unit = call->units;
    call->units += w.units();
    call->weights.push_back(w);
  }
  if (levels != INFINITY) x.allocate_levels(levels);
  int64_t all = pool.num_threads();
  share(pool, x.m, std::min<int64_t>(all, x.m * x.k / kThreadWork + 1), [call] {
    return [&x = call->x](int64_t row) { x.read(row); };
  });
  int64_t blocks = (x.m + kBlockRows - 1) / kBlockRows;
  share(pool, call->units * blocks, std::min(all, work * ((x.m + 3) / 4) / kThreadWork + 1), [call] {
    return [&call = *call](int64_t unit) { call.multiply(unit); };
  });
  return ffi::Error::Success();
}

}  // namespace

XLA_FFI_DEFINE_HANDLER_SYMBOL(NeurojaxRows, multiply_all,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Attr<ffi::Span<const int64_t>>("about")
                                  .RemainingArgs()
                                  .RemainingRets());
