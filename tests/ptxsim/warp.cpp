// Warp collectives: shfl, vote, match, redux, elect, bar.warp.
//
// Each lane passes its arguments to collective() and blocks; the last one to arrive runs the function for all.
#include <algorithm>

#include "core.hpp"

namespace ptxsim {
struct ShflArg {
  int mode;
  u32 v, b, c, out;
  bool p;
};
u32 shfl(Thread& t, u32 key, int mode, u32 v, u32 b, u32 c, u32 mask, bool* p) {
  ShflArg a{mode, v, b, c, v, false};
  collective(
      t, key, mask, &a,
      [](Warp&, u32 m, void** args, const void*) {
        for (u32 l = 0; l < 32; l++)
          if (m >> l & 1) {
            ShflArg& a = *(ShflArg*)args[l];
            u32 seg = a.c >> 8 & 31, clamp = a.c & 31, b = a.b & 31;
            u32 maxl = (l & seg) | (clamp & ~seg), minl = l & seg, j = l;
            switch (a.mode) {
              case 0:
                j = l - b;
                a.p = (s32)j >= (s32)maxl;
                break;  // up
              case 1:
                j = l + b;
                a.p = j <= maxl;
                break;  // down
              case 2:
                j = l ^ b;
                a.p = j <= maxl;
                break;  // bfly
              case 3:
                j = minl | (b & ~seg);
                a.p = j <= maxl;
                break;  // idx
            }
            if (!a.p) j = l;
            a.out = m >> j & 1 ? ((ShflArg*)args[j])->v : 0xdeadbeef;  // reading an inactive lane is undefined
          }
      },
      nullptr, "shfl.sync");
  if (p) *p = a.p;
  return a.out;
}
struct VoteArg {
  int mode;
  bool p;
  u32 out;
};
u32 vote(Thread& t, u32 key, int mode, bool p, u32 mask) {
  VoteArg a{mode, p, 0};
  collective(
      t, key, mask, &a,
      [](Warp&, u32 m, void** args, const void*) {
        u32 b = 0;
        for (u32 l = 0; l < 32; l++)
          if ((m >> l & 1) && ((VoteArg*)args[l])->p) b |= 1u << l;
        for (u32 l = 0; l < 32; l++)
          if (m >> l & 1) {
            VoteArg& a = *(VoteArg*)args[l];
            a.out = a.mode == 0 ? b : a.mode == 1 ? b != 0 : a.mode == 2 ? b == m : (b == m || b == 0);
          }
      },
      nullptr, "vote.sync");
  return a.out;
}
struct MatchArg {
  bool all;
  u64 v;
  u32 out;
  bool p;
};
u32 match(Thread& t, u32 key, bool all, u64 v, u32 mask, bool* p) {
  MatchArg a{all, v, 0, false};
  collective(
      t, key, mask, &a,
      [](Warp&, u32 m, void** args, const void*) {
        for (u32 l = 0; l < 32; l++)
          if (m >> l & 1) {
            MatchArg& a = *(MatchArg*)args[l];
            u32 eq = 0;
            for (u32 j = 0; j < 32; j++)
              if ((m >> j & 1) && ((MatchArg*)args[j])->v == a.v) eq |= 1u << j;
            a.p = eq == m;
            a.out = a.all ? (a.p ? m : 0) : eq;
          }
      },
      nullptr, "match.sync");
  if (p) *p = a.p;
  return a.out;
}
struct ReduxArg {
  int op;
  u32 v;
};
u32 redux(Thread& t, u32 key, int op, u32 v, u32 mask) {
  ReduxArg a{op, v};
  collective(
      t, key, mask, &a,
      [](Warp&, u32 m, void** args, const void*) {
        u32 r = 0;
        bool first = true;
        for (u32 l = 0; l < 32; l++)
          if (m >> l & 1) {
            ReduxArg& a = *(ReduxArg*)args[l];
            if (first) {
              r = a.v;
              first = false;
              continue;
            }
            switch (a.op) {
              case 0:
                r &= a.v;
                break;
              case 1:
                r |= a.v;
                break;
              case 2:
                r ^= a.v;
                break;
              case 3:
                r += a.v;
                break;
              case 4:
                r = std::min(r, a.v);
                break;
              case 5:
                r = std::max(r, a.v);
                break;
              case 6:
                r = std::min((s32)r, (s32)a.v);
                break;
              case 7:
                r = std::max((s32)r, (s32)a.v);
                break;
            }
          }
        for (u32 l = 0; l < 32; l++)
          if (m >> l & 1) ((ReduxArg*)args[l])->v = r;
      },
      nullptr, "redux.sync");
  return a.v;
}
// Divergence has no fixed meaning for independent fibers; the live lanes are a legal answer
// for code that is converged, which is the only portable use of activemask.
u32 activemask(Thread& t) { return fiber(t).own_warp->live; }
bool elect(Thread& t, u32 key, u32 mask, u32* leader) {
  u32 out = 0;
  collective(
      t, key, mask, &out,
      [](Warp&, u32 m, void** args, const void*) {
        for (u32 l = 0; l < 32; l++)
          if (m >> l & 1) *(u32*)args[l] = __builtin_ctz(m);
      },
      nullptr, "elect.sync");
  if (leader) *leader = out;
  return out == t.lane;
}
void warp_bar(Thread& t, u32 key, u32 mask) {
  collective(
      t, key, mask, nullptr,
      [](Warp& w, u32 m, void**, const void*) {
        VectorClock all;
        for (u32 l = 0; l < 32; l++)
          if (m >> l & 1) release(*w.lanes[l], all);
        for (u32 l = 0; l < 32; l++)
          if (m >> l & 1) acquire(*w.lanes[l], all);
      },
      nullptr, "bar.warp.sync");
}
}  // namespace ptxsim
