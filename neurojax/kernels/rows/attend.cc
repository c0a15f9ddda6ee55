// Attention of one query of each row over a cache, on a CPU. native/library.py compiles this file.
//
// A row's result has one order of sums, whatever other rows hold and how many there are. Keys and values
// of a row and a head are matrices whose rows lie one after the other, so that both products are those
// of products.h.

#include "products.h"

namespace {

constexpr int64_t kKeyWork = 1 << 16;  // bytes of keys and values worth waking a thread

// exp(x) of x <= 0, to 2 units in the last place, by one operation after the other. The polynomial is
// that of Cephes (expf.c), on half a binary octave around 0.
inline float exp_of(float x) {
  x = std::max(x, -87.0f);
  float n = x * 1.44269504f + 0x1.8p23f;  // rounded to an integer, in the lowest bits
  uint32_t power = bits_of<uint32_t>(n) << 23;
  n = n - 0x1.8p23f;
  float r = (x - n * 0.693359375f) - n * -2.12194440e-4f;
  float p = 1.9875691500e-4f;
  for (float c : {1.3981999507e-3f, 8.3334519073e-3f, 4.1665795894e-2f, 1.6666665459e-1f,
                  5.0000001201e-1f}) {
    p = p * r + c;
  }
  p = (p * (r * r) + r) + 1.0f;
  return bits_of<float>(bits_of<uint32_t>(p) + power);
}

struct Cache {
  Numbers keys, values;  // of a layer: [rows, heads, capacity, width]
  int64_t heads, capacity, width, window;  // 0: no window
  float softcap;                           // 0: no cap
};

// What one thread works with.
class Attention {
 public:
  // Queries [group, width] of a row at `position` and a head of keys, to `out` alike.
  void attend(const float* q, int64_t group, const Cache& c, int64_t place, int64_t position,
              float* out) {
    std::fill_n(out, group * c.width, 0.0f);
    if (position < 0) return;
    int64_t first = c.window ? std::max<int64_t>(position - c.window + 1, 0) : 0;
    first = std::max(first, position - c.capacity + 1);
    // Positions go round: one run of keys, or two.
    int64_t begin = first % c.capacity, count = position + 1 - first;
    int64_t head = std::min(count, c.capacity - begin);
    float* scores = scores_.at_least(group * count);
    read(q, group, c.width);
    multiply(kRows, c.keys, place + begin, head, c.width, scores);
    multiply(kRows, c.keys, place, count - head, c.width, scores + group * head);
    float* total = total_.at_least(group);
    for (int64_t g = 0; g < group; ++g) {
      float* runs[] = {scores + g * head, scores + group * head + g * (count - head)};
      int64_t lengths[] = {head, count - head};
      float most = -INFINITY;
      for (int i = 0; i < 2; ++i) {
        for (int64_t j = 0; j < lengths[i]; ++j) {
          float& s = runs[i][j];
          if (c.softcap > 0) s = c.softcap * std::tanh(s / c.softcap);
          // A score that is no number stays the greatest.
          most = s <= most ? most : s;
        }
      }
      total[g] = 0;
      for (int i = 0; i < 2; ++i) {
        for (int64_t j = 0; j < lengths[i]; ++j) runs[i][j] = exp_of(runs[i][j] - most);
        for (int64_t j = 0; j < lengths[i]; ++j) total[g] += runs[i][j];
      }
    }
    float* part = part_.at_least(group * c.width);
    for (int i = 0; i < 2; ++i) {
      int64_t length = i == 0 ? head : count - head;
      if (length == 0) continue;
      read(i == 0 ? scores : scores + group * head, group, length);
      multiply(kMatrix, c.values, place + (i == 0 ? begin : 0), c.width, length, part);
      for (int64_t j = 0; j < group * c.width; ++j) out[j] += part[j];
    }
    for (int64_t j = 0; j < group * c.width; ++j) out[j] /= total[j / c.width];
  }

 private:
  void read(const float* rows, int64_t m, int64_t k) {
    x_.m = m, x_.k = k;
    x_.allocate(reinterpret_cast<const uint8_t*>(rows), ffi::DataType::F32);
    for (int64_t i = 0; i < m; ++i) x_.read(i);
  }

  // The rows that were read times n columns or rows of k numbers, the first of them at `place`.
  void multiply(Kind kind, const Numbers& all, int64_t place, int64_t n, int64_t k, float* out) {
    if (n == 0) return;
    Weight w = {};
    int64_t width = kind == kRows ? k : n;
    w.kind = kind, w.n = n, w.k = k, w.values = {all.at(place * width), all.type}, w.out = out;
    for (int64_t i = 0; i < w.units(); ++i) worker_.multiply(x_, 0, x_.m, w, i * w.unit_channels());
  }

  X x_;
  Worker worker_;
  Buffer<float> scores_, total_, part_;
};

// Arguments: q [rows, heads * group, width], scaled; keys and values [layers, slots, heads, capacity,
// width]; the layer; positions [rows]; slots [rows]. Result: float32, like q.
ffi::Error attend_all(ffi::ThreadPool pool, float softcap, int64_t window, ffi::AnyBuffer q,
                      ffi::AnyBuffer keys, ffi::AnyBuffer values, ffi::Buffer<ffi::S32> layer,
                      ffi::Buffer<ffi::S32> positions, ffi::Buffer<ffi::S32> slots,
                      ffi::Result<ffi::Buffer<ffi::F32>> result) {
  struct Call {
    Cache cache;
    Buffer<float> q;
    const int32_t *positions, *slots;
    int64_t group, most_slot;
    float* out;
  };
  auto shape = keys.dimensions();
  int64_t layers = shape[0], rows = q.dimensions()[0];
  int64_t index = std::clamp<int64_t>(*layer.typed_data(), 0, layers - 1);
  auto of_layer = [=](const ffi::AnyBuffer& all) -> Numbers {
    int64_t bytes = static_cast<int64_t>(all.size_bytes()) / layers;
    return {static_cast<const uint8_t*>(all.untyped_data()) + bytes * index, all.element_type()};
  };
  auto call = std::make_shared<Call>();
  call->cache = {of_layer(keys), of_layer(values), shape[2], shape[3], shape[4], window, softcap};
  call->group = q.dimensions()[1] / shape[2];
  int64_t count = static_cast<int64_t>(q.element_count());
  to_floats(static_cast<const uint8_t*>(q.untyped_data()), q.element_type(), count,
            call->q.at_least(count));
  call->positions = positions.typed_data();
  call->slots = slots.typed_data();
  call->most_slot = shape[1] - 1;
  call->out = result->typed_data();
  int64_t work = 0;
  for (int64_t b = 0; b < rows; ++b) {
    int64_t seen = std::min<int64_t>(call->positions[b] + 1, window ? window : shape[3]);
    work += 2 * seen * shape[2] * shape[4] * bytes_of(keys.element_type());
  }
  int64_t threads = std::clamp<int64_t>(work / kKeyWork + 1, 1, pool.num_threads());
  share(pool, rows * shape[2], threads, [call] {
    return [&call = *call](int64_t unit) {
      thread_local Attention attention;
      const Cache& c = call.cache;
      int64_t offset = unit * call.group * c.width, row = unit / c.heads;
      int64_t slot = std::clamp<int64_t>(call.slots[row], 0, call.most_slot);
      int64_t place = (slot * c.heads + unit % c.heads) * c.capacity;
      attention.attend(call.q.data() + offset, call.group, c, place, call.positions[row],
                       call.out + offset);
    };
  });
  return ffi::Error::Success();
}

}  // namespace

XLA_FFI_DEFINE_HANDLER_SYMBOL(NeurojaxAttend, attend_all,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Attr<float>("softcap")
                                  .Attr<int64_t>("window")
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::Buffer<ffi::S32>>()
                                  .Arg<ffi::Buffer<ffi::S32>>()
                                  .Arg<ffi::Buffer<ffi::S32>>()
                                  .Ret<ffi::Buffer<ffi::F32>>());
