/* diary.h: what a training tells as it goes: lines on the terminal, and files that keep the curve and the plans. */
#ifndef DIARY_H
#define DIARY_H
#include <stdio.h>

#include "gpt.h"
#include "text.h"

typedef struct diary {
  FILE *curve, *plans;  /* --save-log, --plan-log; NULL: not kept */
  int terminal;         /* prints to one: a line every second, else every five */
  char workers[32];     /* how a line says how many there are */
  double tokens, flops; /* of a step; of a token */
  double start, shown;  /* seconds: when training began, when a line was shown last */
  double sum, load;     /* of the losses since then */
  int since;            /* steps since then */
} diary;

fmoe_status diary_open(diary *d, char *error /* [TRAIN_ERROR] */); /* the files; d is all zero */
void diary_close(diary *d);

void diary_introduce(const gpt *model, const text *learnt);
void diary_start(diary *d, const gpt *model, int workers, double time); /* steps follow */
void diary_plans(diary *d, const gpt *model, int step);                 /* after a step's backward */
/* What a step gave, which was over at `time`.  looks: a line is due; evaluates: held_out is new, else it may be NAN. */
void diary_step(diary *d, int step, double time, const gpt_loss *loss, double held_out, int looks, int evaluates);

double now(void); /* seconds, of a clock that only goes forward */
#endif
